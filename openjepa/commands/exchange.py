"""The commands that bring weights in and out: import, export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openjepa.commands.options import chosen, height_and_width, pairs, refuse


def import_(args: argparse.Namespace, rest: list[str]) -> None:
    from dataclasses import replace

    from openjepa.convert import formats
    from openjepa.convert.names import Told
    from openjepa.engine.whole import refuse_full
    from openjepa.recipes.exchange import import_weights
    from openjepa.recipes.recipe import from_dict, of_processes, parse

    refuse_full(Path(args.out))
    values = pairs(rest)
    said = {name: values.pop(f"model.{name}") for name in ("heads", "image_size") if f"model.{name}" in values}
    told = from_dict(Told, {name: parse(f"model.{name}", text) for name, text in said.items()}, "model")
    if "mae.decoder_heads" in values:
        heads = parse("mae.decoder_heads", values["mae.decoder_heads"])
        told = replace(told, decoder_heads=from_dict(Told, {"decoder_heads": heads}, "mae").decoder_heads)
    base, of_one_process = chosen(args)
    if base:
        painter = base.mae.decoder_heads if base.method == "mae" else None
        told = Told(
            told.heads or base.model.heads, told.image_size or base.model.image_size, told.decoder_heads or painter
        )
    imported = formats.read(args.source, told)
    if base and of_one_process:
        base = of_processes(base, imported.processes)
    notes = import_weights(imported, args.source, Path(args.out), base, values)
    model = imported.model
    size = f"{model.dim} wide, {model.n_blocks} deep, {model.n_heads} heads, patches of {model.patch_size}"
    print(f"{args.out}: {size}, images of {model.image_size[0]}x{model.image_size[1]}, step {imported.step}")
    for note in notes:
        print(f"note: {note}")
    print(
        f"next: openjepa evaluate {args.out} --train SPEC --test SPEC, or openjepa pretrain --out {args.out} --data SPEC"
    )


def export(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.exchange import export

    refuse(rest)
    line = export(args.source, args.format, Path(args.out), args.network, height_and_width(args.image_size))
    print(f"written to {args.out}\nload: {line}")


def add(commands: Any) -> None:
    """Their options."""
    p = commands.add_parser(
        "import",
        help="make a run of weights from elsewhere",
        epilog="The shapes say the architecture; --model.heads N, --model.image_size H,W and --mae.decoder_heads N say what they "
        "cannot. Any other value of the recipe is what training goes on with.",
    )
    p.add_argument(
        "source", metavar="FILE", help="released *.pth.tar or *.pth, Hugging Face or timm folder or file, or hf:NAME"
    )
    p.add_argument("--out", metavar="RUN", required=True)
    p.add_argument("--recipe", metavar="NAME")
    p.add_argument("--config", metavar="FILE.yaml", help="the recipe it was made with, ours or a released one")

    p = commands.add_parser("export", help="write an encoder for other libraries")
    p.add_argument("source", metavar="RUN")
    p.add_argument("--format", required=True, metavar="FORMAT", help="hf, timm, onnx, safetensors or released")
    p.add_argument("--out", metavar="DIR", required=True)
    p.add_argument(
        "--network",
        choices=("target_encoder", "encoder", "predictor"),
        help="target_encoder unless told; a run of MAE has an encoder alone",
    )
    p.add_argument("--image-size", metavar="H,W", help="pixels, other than the run's: positions are interpolated")

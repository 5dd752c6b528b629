"""The command that paints what a run expects: decode train, sample, complete, check."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openjepa.commands.options import SPEC, chosen, named, pairs, refuse, together
from openjepa.errors import UserError


def decode(args: argparse.Namespace, rest: list[str]) -> None:
    """train, sample, complete, check: what a run's predictor expects, as pictures."""
    {"train": decode_train, "sample": decode_sample, "complete": decode_complete, "check": decode_check}[args.what](
        args, rest
    )


def decode_train(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.engine import parallel
    from openjepa.recipes.decoding import train
    from openjepa.recipes.pretrain import saved_data

    out = Path(args.out)
    begun = (out / "recipe.yaml").exists()
    recipe, _ = chosen(args)
    if recipe is None and not begun:
        recipe = named("rcdm_32_cpu")
    data = args.data or (saved_data(out)["data"] if begun else None)
    if data is None:
        raise UserError(f"which images? give --data SPEC: {SPEC}")
    with together():
        train(args.run, data, out, recipe, pairs(rest), Console())
        if parallel.rank() == 0:
            print(f"next: openjepa decode sample {args.run} {data} --decoder {out} --out samples.png")


def decode_sample(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.decoder.paint import Sampling
    from openjepa.recipes.samples import sample

    refuse(rest)
    sampling = Sampling(sampler=args.sampler, steps=args.steps, seed=args.seed)
    files = sample(
        args.run, args.images, args.decoder, Path(args.out), rows=args.rows, samples=args.samples, sampling=sampling,
        box=box_of(args.box), device=args.device, each=args.each,
    )  # fmt: skip
    print(f"written: {files[0]}" + (f" and {len(files) - 1} samples beside it" if len(files) > 1 else ""))


def decode_complete(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.decoder.paint import Sampling
    from openjepa.recipes.samples import complete

    refuse(rest)
    sampling = Sampling(sampler=args.sampler, steps=args.steps, seed=args.seed)
    box = box_of(args.box)
    assert box
    for line in complete(args.run, args.image, args.decoder, Path(args.out), samples=args.samples, sampling=sampling, box=box,
                         device=args.device, each=args.each):  # fmt: skip
        print(line)


def decode_check(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.decoder.paint import Sampling
    from openjepa.recipes.faithfulness import check

    refuse(rest)
    sampling = Sampling(sampler=args.sampler, steps=args.steps, seed=args.seed)
    file = check(args.run, args.decoder, args.data, images=args.images, gallery=args.gallery, samples=args.samples,
                 sampling=sampling, control=args.control, out=Path(args.out) if args.out else None, device=args.device,
                 console=Console())  # fmt: skip
    print(f"written: {file}")


def box_of(text: str | None) -> tuple[int, int, int, int] | None:
    """4,8,16,12 to x, y, width, height. Raises UserError."""
    if text is None:
        return None
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--box {text}: give x,y,width,height in whole pixels, such as 8,8,12,12") from error
    return x, y, width, height


def add(commands: Any) -> None:
    """Their options."""
    p = commands.add_parser(
        "decode", help="train a decoder that paints what a run's predictor expects, and ask it (docs/decoder.md)"
    )
    decode_parsers(p.add_subparsers(dest="what", metavar="WHAT", required=True))


def decode_parsers(ways: Any) -> None:
    p = ways.add_parser(
        "train",
        help="train a decoder (RCDM) for a run; the same DECODER goes on",
        epilog="Any value of the recipe: --rcdm.of block, --rcdm.paint image, --schedule.epochs 10 (openjepa recipes "
        "rcdm_32_cpu prints them all)",
    )
    p.add_argument("run", metavar="RUN")
    p.add_argument("--data", metavar="SPEC", help=SPEC)
    p.add_argument("--out", metavar="DECODER", required=True)
    p.add_argument("--recipe", metavar="NAME", help="rcdm_32_cpu unless told")
    p.add_argument("--config", metavar="FILE.yaml", help="a recipe as YAML, such as DECODER/recipe.yaml")

    p = ways.add_parser("sample", help="the paper's figure: image, context, samples of the hidden block")
    p.add_argument("run", metavar="RUN")
    p.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or a SPEC, whose first images are taken")
    p.add_argument("--rows", type=int, default=4, help="images of a SPEC: 4 unless told")
    painting(p)
    p.add_argument(
        "--box", metavar="X,Y,W,H", help="the block, in pixels of each image; drawn as in training unless told"
    )

    p = ways.add_parser("complete", help="complete an image: several hypotheses of what is in a box, side by side")
    p.add_argument("run", metavar="RUN")
    p.add_argument("image", metavar="IMAGE")
    painting(p)
    p.add_argument("--box", metavar="X,Y,W,H", required=True, help="what is to be painted, in pixels of the image")

    p = ways.add_parser("check", help="measure whether samples are true to the representation, beside controls")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--data", metavar="SPEC", required=True, help="images that it was not trained on")
    p.add_argument("--images", type=int, default=64, help="that are painted: 64 unless told")
    p.add_argument(
        "--gallery", type=int, default=1000, help="that each is looked for among, itself one of them: 1000 unless told"
    )
    p.add_argument("--control", metavar="DECODER", help="one trained with --rcdm.networks random")
    painting(p, picture=False)


def painting(p: argparse.ArgumentParser, picture: bool = True) -> None:
    """Options of what draws samples."""
    p.add_argument("--decoder", metavar="DECODER", required=True)
    p.add_argument("--samples", type=int, default=4, help="of each image: 4 unless told")
    p.add_argument("--steps", type=int, default=100, help="of the diffusion's 1000: 100 unless told")
    p.add_argument("--sampler", default="ddpm", help="ddpm (the paper's), or ddim: no noise after the first")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")
    if picture:
        p.add_argument("--out", metavar="FILE.png", required=True)
        p.add_argument("--each", action="store_true", help="also each sample as a file of its own")
    else:
        p.add_argument("--out", metavar="DIR", help="of faithfulness.json: the decoder's folder, unless told")

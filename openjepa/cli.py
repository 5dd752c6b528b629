"""The commands: parse, call, say what comes next."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from pathlib import Path
from typing import Any

from openjepa import __version__
from openjepa.engine import slurm
from openjepa.errors import UserError, nearest, printable

SPEC = "folder, FILE.parquet, shard-{0000..0009}.tar, hf:NAME[:SPLIT], torchvision:NAME[:SPLIT], clevr:ROOT[:SPLIT] or scenes[:N]"

AUTO = "ijepa_auto"
# What a full, broken or closed disk says, wherever it is said, and one that lies behind a network.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
NETWORK = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
           errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH)  # fmt: skip


def pretrain(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.engine import parallel
    from openjepa.engine.launch import joined
    from openjepa.engine.run import Interrupted
    from openjepa.recipes.pretrain import pretrain
    from openjepa.recipes.report import report

    if any(word.startswith("--slurm.") for word in rest):
        submit(args, rest)
        return
    try:
        with joined():
            recipe, data, out = training(args, pairs(rest), parallel.world_size())
            if recipe.method == "rcdm":
                raise UserError(f"a decoder is made for a run: openjepa decode train RUN --data {data} --out {out}")
            pretrain(recipe, data, out, Console())
            if parallel.rank() == 0:
                print(f"pictures: {report(out)}\nnext: openjepa evaluate {out} --train SPEC --test SPEC")
    except Interrupted as stop:
        if parallel.launched()[0] == 0:
            print(f"stopped: {stop}; the same command goes on", file=sys.stderr)
        sys.exit(stop.status)


def decode(args: argparse.Namespace, rest: list[str]) -> None:
    """train, sample, complete, check: what a run's predictor expects, as pictures."""
    {"train": decode_train, "sample": decode_sample, "complete": decode_complete, "check": decode_check}[args.what](
        args, rest
    )


def decode_train(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.engine import parallel
    from openjepa.engine.launch import joined
    from openjepa.engine.run import Interrupted
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
    try:
        with joined():
            train(args.run, data, out, recipe, pairs(rest), Console())
            if parallel.rank() == 0:
                print(f"next: openjepa decode sample {args.run} {data} --decoder {out} --out samples.png")
    except Interrupted as stop:
        if parallel.launched()[0] == 0:
            print(f"stopped: {stop}; the same command goes on", file=sys.stderr)
        sys.exit(stop.status)


def decode_sample(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.decoder.paint import Sampling
    from openjepa.recipes.decoding import sample

    refuse(rest)
    sampling = Sampling(sampler=args.sampler, steps=args.steps, seed=args.seed)
    files = sample(
        args.run, args.images, args.decoder, Path(args.out), rows=args.rows, samples=args.samples, sampling=sampling,
        box=box_of(args.box), device=args.device, each=args.each,
    )  # fmt: skip
    print(f"written: {files[0]}" + (f" and {len(files) - 1} samples beside it" if len(files) > 1 else ""))


def decode_complete(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.decoder.paint import Sampling
    from openjepa.recipes.decoding import complete

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
    from openjepa.recipes.decoding import check

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


def training(args: argparse.Namespace, values: dict[str, str], processes: int) -> tuple[Any, str, Path]:
    """What is to be trained by so many processes: recipe, images, run."""
    from openjepa.recipes.pretrain import saved_data, saved_recipe
    from openjepa.recipes.recipe import of_processes, override

    out = Path(args.out)
    begun = (out / "recipe.yaml").exists()
    if args.budget and args.recipe != AUTO:
        raise UserError(f"--budget is of {AUTO}: others say how long they train, --schedule.epochs")
    recipe, of_one_process = (None, False) if args.recipe == AUTO and begun else chosen(args, processes)
    if recipe and of_one_process:
        recipe = of_processes(recipe, processes)
    recipe = recipe or (saved_recipe(out) if begun else None)
    if recipe is None:
        raise UserError("which recipe? give --recipe NAME (openjepa recipes lists them) or --config FILE.yaml")
    data = args.data or (saved_data(out)["data"] if (out / "data.json").exists() else None)
    if data is None:
        raise UserError(f"which images? give --data SPEC: {SPEC}")
    return override(recipe, values), data, out


def submit(args: argparse.Namespace, rest: list[str]) -> None:
    """pretrain with --slurm options: the same command without them, as a job."""
    from openjepa.recipes.pretrain import check
    from openjepa.recipes.recipe import from_dict, nested

    values = pairs(rest)
    asked = {name: values.pop(name) for name in list(values) if name.startswith("slurm.")}
    config = from_dict(slurm.SlurmConfig, nested(asked)["slurm"], "slurm")
    recipe, data, out = training(args, values, config.processes)
    check(recipe, data, out, config.processes)  # refused here, not after hours in the queue
    how = ["--recipe", args.recipe] if args.recipe else ["--config", args.config] if args.config else []
    words = ["pretrain", *how, "--data", data, "--out", args.out]
    words += [word for name, value in values.items() for word in (f"--{name}", value)]
    logs = out / "slurm"
    job = slurm.submit(words, config, logs)
    nodes = f"{config.nodes} nodes" if config.nodes > 1 else "1 node"
    print(f"job {job} submitted: {nodes}, {config.processes} processes; its log: {logs / job}_0_log.out")
    print(f"next: openjepa report {out}")


def evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.evaluation import Question, evaluate

    names = ("source", "train", "test", "suite", "network", "precision", "device", "seed", "squash", "fresh", "workers")
    question = Question(
        **{name: getattr(args, name) for name in names},
        image_size=height_and_width(args.image_size),
        share=args.crop,
        sets=args.sets.split(",") if args.sets else (),
        protocols=args.protocols.split(",") if args.protocols else None,
        tasks=args.tasks.split(",") if args.tasks else None,
        root=Path(args.root) if args.root else None,
        out=Path(args.out) if args.out else None,
    )
    file = evaluate(question, pairs(rest), Console())
    if (file.parent / "recipe.yaml").exists():
        print(f"next: openjepa report {file.parent}")


def finetune(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.finetuning import Finetuning, finetune

    names = ("source", "train", "test", "recipe", "task", "network", "squash", "precision", "device", "seed", "workers")
    asked = Finetuning(**{name: getattr(args, name) for name in names}, share=args.crop, out=Path(args.out))
    finetune(asked, pairs(rest), Console())


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


def embed(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.embedding import Embedding, embed, skipped_file

    refuse(rest)
    names = ("run", "data", "layers", "pool", "half", "network", "squash", "precision", "device", "workers")
    given = {name: getattr(args, name) for name in names}
    out = Path(args.out)
    made = embed(Embedding(**given, out=out, image_size=height_and_width(args.image_size), share=args.crop), Console())
    rate = f", {made.made / made.seconds:,.0f} a second" if made.made else ", as before"
    print(f"{out}: {made.images:,} images, {made.dim} numbers a feature{rate}")
    if made.skipped:
        print(f"{len(made.skipped)} left out, named in {skipped_file(out)}, the first is {made.skipped[0]}")
    print(f"next: openjepa search neighbours {out} IMAGE --draw neighbours.png")


def search(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.searching import build, opened

    refuse(rest)
    if args.question == "build":
        table = build(Path(args.table), Path(args.out))
        print(
            f"{args.out}: {table.rows:,} rows\nnext: openjepa search neighbours {args.out} IMAGE --draw neighbours.png"
        )
        return
    if args.draw:
        from openjepa.engine.whole import refuse_unwritable

        refuse_unwritable(Path(args.draw).parent)
    {"neighbours": search_neighbours, "duplicates": search_duplicates, "outliers": search_outliers}[args.question](
        args, opened(Path(args.table))
    )


def search_neighbours(args: argparse.Namespace, table: Any) -> None:
    from openjepa.engine.device import pick_device
    from openjepa.recipes.looking import Pictures, Region, draw, query, wrapped
    from openjepa.recipes.searching import neighbours

    box, patch = whole_numbers("--box", args.box, 4), whole_numbers("--patch", args.patch, 2)
    region = Region(box, patch) if box or patch else None
    asked = query(table, args.image, region, args.run, args.data, pick_device(args.device), bool(args.draw))
    found = neighbours(table, asked.vector, args.k)
    say(found, args.json)
    if args.draw:
        pictures = Pictures(table, args.data)
        draw(wrapped([asked.tile(pictures.view), *(pictures.tile(hit) for hit in found)]), Path(args.draw))
        print(f"drawn: {args.draw}", file=sys.stderr)


def search_duplicates(args: argparse.Namespace, table: Any) -> None:
    from openjepa.engine.device import pick_device
    from openjepa.recipes.looking import COLUMNS, Pictures, draw
    from openjepa.recipes.searching import duplicates

    found = duplicates(table, args.above, pick_device(args.device))
    if args.json:
        print(json.dumps([[hit.said() for hit in group] for group in found], indent=1))
    else:
        print(f"{len(found)} groups of {sum(map(len, found))} images, alike to {args.above} or more")
        for group in found[: args.n]:
            say(group, False)
    if args.draw and found:
        pictures = Pictures(table, args.data)
        draw([[pictures.tile(hit) for hit in group[:COLUMNS]] for group in found[: args.n]], Path(args.draw))
        print(f"drawn: {args.draw}", file=sys.stderr)


def search_outliers(args: argparse.Namespace, table: Any) -> None:
    from openjepa.engine.device import pick_device
    from openjepa.recipes.looking import Pictures, draw, wrapped
    from openjepa.recipes.searching import outliers

    found = outliers(table, args.n, args.k, pick_device(args.device))
    say(found, args.json)
    if args.draw:
        pictures = Pictures(table, args.data)
        draw(wrapped([pictures.tile(hit) for hit in found]), Path(args.draw))
        print(f"drawn: {args.draw}", file=sys.stderr)


def say(found: Any, as_json: bool) -> None:
    """What a search found."""
    from rich.console import Console
    from rich.table import Table

    said = [hit.said() for hit in found]
    if as_json:
        print(json.dumps(said, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for name, value in said[0].items():
        table.add_column(name, justify="right" if isinstance(value, (int, float)) else "left", overflow="fold")
    for row in said:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else tail(str(value)) for value in row.values()))
    Console(highlight=False, markup=False).print(table)


def tail(text: str, longest: int = 40) -> str:
    """The end of a long path."""
    return text if len(text) <= longest else "…" + text[1 - longest :]


def report(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.report import report

    refuse(rest)
    print(f"pictures: {report(Path(args.run))}")


def surprise(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.surprise import Question, score_images

    refuse(rest)
    names = ("run", "reference", "data", "task", "normal", "stride", "squash", "precision", "device")
    question = Question(
        **{name: getattr(args, name) for name in names},
        out=Path(args.out),
        block=whole_numbers("--block", args.block, 2),
        share=args.crop,
    )
    score_images(question, Console())


def inspect(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.inspect import Looking, inspect

    refuse(rest)
    names = ("run", "images", "reference", "attention_block", "squash", "device")
    asked = Looking(
        **{name: getattr(args, name) for name in names},
        out=Path(args.out),
        patch=whole_numbers("--patch", args.patch, 2),
        block=whole_numbers("--block", args.block, 2),
        share=args.crop,
    )
    found = inspect(asked)
    for note in found.notes:
        print(f"note: {note}")
    for name, what in found.pictures.items():
        print(f"{asked.out / name}  {what}")
    print(f"all on one page: {asked.out / 'index.html'}")


def demo(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.demo import demo

    refuse(rest)
    demo(Path(args.out), args.seed, Console())


def pack(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.packing import SKIPPED_NAME, pack

    refuse(rest)
    if args.shard_size < 1:
        raise UserError(f"--shard-size is {args.shard_size}: give megabytes, 1 or more")
    packed = pack(args.source, Path(args.out), args.shard_size * 10**6, Console())
    print(f"{packed.images} images in {packed.shards} shards: {packed.spec}")
    if packed.skipped:
        first = ": ".join(packed.skipped[0].split("\t"))
        print(f"{len(packed.skipped)} left out, named in {Path(args.out) / SKIPPED_NAME}, the first is {first}")
    if packed.maps:
        print(f"note: labels of images alone were packed, not {' and '.join(packed.maps)}")
    print(f"next: openjepa pretrain --recipe NAME --data '{packed.spec}' --out RUN")


def replay(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.replay import replay

    refuse(rest)
    for line in replay(Path(args.step)):
        print(line)


def recipes(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.named import RECIPES
    from openjepa.recipes.recipe import to_yaml

    refuse(rest)
    if (args.data or args.budget) and args.name != AUTO:
        raise UserError(f"--data and --budget are of {AUTO}")
    if args.name:
        recipe = automatic(args.data, args.budget) if args.name == AUTO else named(args.name)
        print(to_yaml(recipe), end="")
        return
    print(f"{AUTO:24} Chosen for your images, this machine and a time: --data SPEC --budget 30min; says why.")
    for name, make in RECIPES.items():
        print(f"{name:24} {(make.__doc__ or '').strip().splitlines()[0]}")


def bench(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.bench.measure import measure
    from openjepa.engine.run import Interrupted

    plot, out = (Path(file) if file else None for file in (args.plot, args.out))
    asked = {name: getattr(args, name) for name in ("test", "methods", "budget", "seeds", "looks")}
    if args.what == "compare":
        asked["values"] = pairs(rest)
    else:
        refuse(rest)
    try:
        measure(args.what, peer=args.against, spec=args.data, plot=plot, out=out, as_json=args.json, **asked)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(stop.status)


COMMANDS = {
    "demo": demo,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "finetune": finetune,
    "decode": decode,
    "import": import_,
    "export": export,
    "embed": embed,
    "search": search,
    "report": report,
    "inspect": inspect,
    "surprise": surprise,
    "pack": pack,
    "replay": replay,
    "recipes": recipes,
    "bench": bench,
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="openjepa", description="Self-supervised image representations with I-JEPA.")
    top.add_argument("--version", action="version", version=f"openjepa {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    p = commands.add_parser("demo", help="pretrain on embedded scenes, evaluate, draw: minutes, no data needed")
    p.add_argument("--out", metavar="DIR", default="openjepa-demo")
    p.add_argument("--seed", type=int, default=0)

    p = commands.add_parser(
        "pretrain",
        help="pretrain an encoder on a pile of images; the same RUN goes on",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any value of the recipe: --optim.lr 5e-4, --masking.targets 6 (openjepa recipes NAME prints them all).\n"
        "On several GPUs: torchrun --nproc-per-node 8 -m openjepa pretrain …\n\n"
        f"as a job of Slurm's, with any of (docs/reliability.md):\n{slurm.described()}",
    )
    p.add_argument("--recipe", metavar="NAME")
    p.add_argument("--config", metavar="FILE.yaml", help="a recipe as YAML, such as RUN/recipe.yaml")
    p.add_argument("--data", metavar="SPEC", help=SPEC)
    p.add_argument("--budget", metavar="TIME", help=f"with {AUTO}: 30min unless told")
    p.add_argument("--out", metavar="RUN", required=True)

    p = commands.add_parser(
        "evaluate",
        help="score an encoder beside random weights and raw pixels",
        epilog="Any value of a protocol: --linear.epochs 100, --knn.ks 10,20 (docs/evaluation.md lists them)",
    )
    p.add_argument("source", metavar="RUN", help="or anything that was exported or can be imported")
    p.add_argument("--train", metavar="SPEC", help="labelled images that probes learn from")
    p.add_argument("--test", metavar="SPEC", help="labelled images that they are scored on")
    p.add_argument(
        "--sets", metavar="NAMES", help="instead: data sets by name, such as cifar100,food101 (docs/evaluation.md)"
    )
    p.add_argument(
        "--suite", metavar="NAME", help="instead: paper (its tables), or transfer (every set that is at hand)"
    )
    p.add_argument("--root", metavar="DIR", help="where sets lie by their names: DIR/NAME/train, DIR/NAME/val")
    p.add_argument(
        "--protocols", metavar="NAMES", help="knn,linear unless told; lowshot:1%%,attentive,segment:knn,depth,quality …"
    )
    p.add_argument("--tasks", metavar="NAMES", help="all sets of labels unless told")
    how(p)
    p.add_argument("--image-size", metavar="H,W", help="pixels, other than the encoder's own")
    p.add_argument("--out", metavar="DIR", help="of evaluation.json: the run, unless told")
    p.add_argument("--fresh", action="store_true", help="ask again what was answered before")

    p = commands.add_parser(
        "finetune",
        help="train the whole encoder on labels, and keep the classifier",
        epilog="Any value of the recipe: --finetune.epochs 20, --finetune.lr 1e-4 (docs/evaluation.md lists them)",
    )
    p.add_argument("source", metavar="RUN", help="or anything that was exported or can be imported")
    p.add_argument("--recipe", default="low_shot", metavar="NAME", help="low_shot (the default), full or mae")
    p.add_argument("--train", metavar="SPEC", required=True)
    p.add_argument("--test", metavar="SPEC", required=True)
    p.add_argument("--task", metavar="NAME", help="which labels, where there are several sets")
    p.add_argument("--out", metavar="DIR", required=True, help="of classifier.safetensors and evaluation.json")
    how(p)

    p = commands.add_parser(
        "decode", help="train a decoder that paints what a run's predictor expects, and ask it (docs/decoder.md)"
    )
    decode_parsers(p.add_subparsers(dest="what", metavar="WHAT", required=True))

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

    p = commands.add_parser(
        "embed", help="features of images, as a Parquet file; the same command goes on where it stopped"
    )
    p.add_argument("run", metavar="RUN", help="or anything that was exported or can be imported")
    p.add_argument("--data", metavar="SPEC", required=True, help=SPEC)
    p.add_argument("--out", metavar="FILE.parquet", required=True)
    p.add_argument("--layers", type=int, default=1, metavar="N", help="the last N, concatenated; 1 unless told")
    p.add_argument(
        "--pool",
        choices=("mean", "patches"),
        default="mean",
        help="one row an image, or one a patch, to search regions",
    )
    p.add_argument("--half", action="store_true", help="float16 instead of float32")
    looking(p)
    p.add_argument("--image-size", metavar="H,W", help="pixels, other than the encoder's own")

    p = commands.add_parser(
        "search", help="neighbours of an image or a part of one, duplicates and outliers, by features"
    )
    questions = p.add_subparsers(dest="question", metavar="QUESTION", required=True)
    q = questions.add_parser("build", help="a LanceDB table of what embed wrote")
    q.add_argument("table", metavar="FEATURES.parquet")
    q.add_argument("--out", metavar="TABLE", required=True, help="a new folder")
    q = questions.add_parser("neighbours", aliases=["neighbors"], help="the images most like one, or like a part of it")
    searched(q)
    q.set_defaults(question="neighbours")
    q.add_argument("image", metavar="IMAGE", help="a file, or the id of an image in the table")
    where = q.add_mutually_exclusive_group()
    where.add_argument("--box", metavar="X,Y,W,H", help="a part of it, in its pixels: left, top, width, height")
    where.add_argument("--patch", metavar="ROW,COL", help="one patch of it")
    q.add_argument("-k", type=int, default=10, metavar="K", help="how many images; 10 unless told")
    q.add_argument("--run", metavar="RUN", help="that the features are of, where it is no longer where it was")
    q = questions.add_parser("duplicates", help="groups of images that are nearly the same")
    searched(q)
    q.add_argument("--above", type=float, default=0.95, metavar="COSINE", help="that makes two alike; 0.95 unless told")
    q.add_argument("-n", type=int, default=20, metavar="N", help="groups to show, the largest first; 20 unless told")
    q = questions.add_parser("outliers", help="what is farthest from its k-th neighbour")
    searched(q)
    q.add_argument("-n", type=int, default=20, metavar="N", help="how many; 20 unless told")
    q.add_argument("-k", type=int, default=5, metavar="K", help="which neighbour; the 5th unless told")

    p = commands.add_parser("report", help="draw a run into RUN/report.html")
    p.add_argument("run", metavar="RUN")

    p = commands.add_parser(
        "inspect", help="draw what a run makes of some images: masks, PCA, attention, surprise, neighbours"
    )
    p.add_argument("run", metavar="RUN")
    p.add_argument("images", metavar="IMAGE", nargs="+", help="files, or a SPEC of a few images")
    p.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")
    p.add_argument(
        "--patch", metavar="ROW,COLUMN", help="whose attention and likeness is drawn, from 0: the middle unless told"
    )
    p.add_argument("--reference", metavar="SPEC", help="images to compare with: the run's own unless told")
    p.add_argument(
        "--attention-block", type=int, default=-1, metavar="N", help="of the encoder, from 0: the last unless told"
    )
    looked(p)

    p = commands.add_parser("surprise", help="score images by how badly a run predicts their patches; a map of each")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--reference", metavar="SPEC", required=True, help="usual images, 100 or more")
    p.add_argument("--data", metavar="SPEC", required=True, help="images to score")
    p.add_argument("--out", metavar="FILE.parquet", required=True, help="id, path, label, score, map of each image")
    p.add_argument("--task", metavar="NAME", help="labels or masks that say what is odd, where it is not plain")
    p.add_argument(
        "--normal",
        metavar="CLASS",
        help="the class that is not odd: normal, good, ok or background unless told",
    )
    p.add_argument(
        "--stride",
        type=int,
        default=1,
        metavar="PATCHES",
        help="from block to block, 1 unless told: 2 is four times as fast",
    )
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="the run's unless told")
    looked(p)

    p = commands.add_parser("pack", help="turn images into tar shards with an index, for any disk or store")
    p.add_argument("source", metavar="SPEC", help=SPEC)
    p.add_argument("out", metavar="OUT", help="a new folder")
    p.add_argument("--shard-size", type=int, default=256, metavar="MB", help="of a shard, at most: 256 unless told")

    p = commands.add_parser("replay", help="compute once more a step that stopped a run, and say where it went wrong")
    p.add_argument("step", metavar="RUN/bad_steps/step-N")

    p = commands.add_parser("recipes", help="list the recipes, or print one")
    p.add_argument("name", nargs="?")
    p.add_argument("--data", metavar="SPEC", help=f"with {AUTO}: the images that it is chosen for")
    p.add_argument("--budget", metavar="TIME", help=f"with {AUTO}: of training, 30min unless told")

    p = commands.add_parser(
        "bench", help="measure on this machine: masks, data, train, evaluate, ... (an unknown name lists them)"
    )
    p.add_argument("what", metavar="WHAT")
    p.add_argument("--against", metavar="PEER", help="train: beside lightly's or stable-pretraining's I-JEPA module")
    p.add_argument(
        "--data",
        metavar="SPEC",
        help="data, compare: of these images instead of rendered ones; fleet: a file of `bench batches`",
    )
    p.add_argument("--test", metavar="SPEC", help="compare: labelled images; else a fifth of --data")
    p.add_argument(
        "--methods", metavar="NAMES", help="compare: ijepa,mae,ibot; also ijepa:loss.target=pixels, or a recipe"
    )
    p.add_argument("--budget", metavar="TIME", help="compare: of training, for each of them: 90s, 30min, 2h")
    p.add_argument("--seeds", metavar="NUMBERS", help="compare: 0 unless told")
    p.add_argument("--looks", metavar="N", help="compare: how often each is scored on its way: 5 unless told")
    p.add_argument("--plot", metavar="FILE.png", help="scaling, compare, fleet: draw it")
    p.add_argument("--json", action="store_true", help="print all numbers as JSON")
    p.add_argument("--out", metavar="FILE", help="add them to a JSON file, one for a machine")
    return top


def searched(q: argparse.ArgumentParser) -> None:
    """What all searches need."""
    q.add_argument(
        "table", metavar="TABLE", help="of search build, or FEATURES.parquet: its table is then made beside it"
    )
    q.add_argument("--draw", metavar="FILE.png", help="a contact sheet")
    q.add_argument("--data", metavar="SPEC", help="the images, where they are no longer where they were: for --draw")
    q.add_argument("--json", action="store_true", help="print JSON")
    q.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")


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


def looked(p: argparse.ArgumentParser) -> None:
    """Options of the commands that look at single images with all networks of a run."""
    p.add_argument(
        "--block",
        metavar="ROWS,COLUMNS",
        help="patches that are hidden together: as the run's own targets unless told",
    )
    p.add_argument(
        "--crop", type=float, default=1.0, metavar="SHARE", help="0.875 is resize 256, crop 224; 1 unless told"
    )
    p.add_argument("--squash", action="store_true", help="the whole image without keeping its aspect")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")


def how(p: argparse.ArgumentParser) -> None:
    """Options of the commands that read labelled images with an encoder."""
    looking(p)
    p.add_argument("--seed", type=int, default=0)


def looking(p: argparse.ArgumentParser) -> None:
    """How an encoder looks at images."""
    p.add_argument(
        "--network",
        choices=("target_encoder", "encoder"),
        help="target_encoder unless told; a run of MAE has an encoder alone",
    )
    p.add_argument(
        "--crop", type=float, metavar="SHARE", help="0.875 is resize 256, crop 224; 1, or the named set's, unless told"
    )
    p.add_argument("--squash", action="store_true", help="the whole image without keeping its aspect, as for CLEVR")
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="of encoder and probes: the run's unless told")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images: beside a GPU up to 8 unless told"
    )


def chosen(args: argparse.Namespace, processes: int = 1) -> tuple[Any, bool]:
    """The recipe that --recipe or --config names, or None; and whether its batch size is that of one process."""
    if args.recipe and args.config:
        raise UserError("give --recipe or --config, not both")
    if args.recipe == AUTO and processes > 1:
        raise UserError(
            f"{AUTO} chooses alone: openjepa recipes {AUTO} --data SPEC > recipe.yaml, then --config recipe.yaml"
        )
    if args.recipe == AUTO and hasattr(args, "budget"):
        return automatic(args.data, args.budget), False
    if args.recipe:
        return named(args.recipe), False
    return read(Path(args.config)) if args.config else (None, False)


def automatic(data: str | None, budget: str | None) -> Any:
    """A recipe for these images; says why."""
    from openjepa.recipes.auto import choose

    if not data:
        raise UserError(f"{AUTO} chooses by the images: give --data SPEC: {SPEC}")
    found = choose(data, budget or "30min")
    for what, why in found.reasons:
        print(f"# {what}: {why}", flush=True)
    return found.recipe


def named(name: str) -> Any:
    from openjepa.recipes.named import RECIPES

    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}'{nearest(name, RECIPES)} (openjepa recipes lists them)")
    return RECIPES[name]()


def read(file: Path) -> tuple[Any, bool]:
    from openjepa.convert import recipe as released
    from openjepa.recipes.recipe import Recipe, from_dict

    values = read_yaml(file)
    if theirs := released.is_released(values):
        translated = released.translate(values)
        for what, keys in (("not used here", released.unused(values)), ("not in it, so ours", released.unsaid(values))):
            if keys:
                print(f"{file.name} is a released recipe; {what}: {', '.join(keys)}", file=sys.stderr)
        try:
            return from_dict(Recipe, translated), theirs
        except UserError as error:
            raise UserError(f"{file.name}: {released.in_their_words(str(error))}") from error
    return from_dict(Recipe, values), theirs


def read_yaml(file: Path) -> Any:
    from openjepa.recipes.recipe import from_yaml

    try:
        return from_yaml(file.read_text())
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config {file} is not YAML: {error}") from error


def height_and_width(text: str | None) -> tuple[int, int] | None:
    """224,320 to (224, 320)."""
    from openjepa.convert.names import Told
    from openjepa.recipes.recipe import from_dict, parse

    return from_dict(Told, {"image_size": parse("image-size", text)}, "model").image_size if text else None


def whole_numbers(name: str, text: str | None, count: int) -> Any:
    """3,4 to (3, 4)."""
    if text is None:
        return None
    words = text.split(",")
    if len(words) != count or not all(word.strip().removeprefix("-").isdecimal() for word in words):
        raise UserError(f"{name} {text}: give {count} whole numbers with commas between them")
    return tuple(map(int, words))


def pairs(rest: list[str]) -> dict[str, str]:
    """--optim.lr 1e-3 --masking.targets=4 to {"optim.lr": "1e-3", …}."""
    values: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument '{word}'")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"--{name} needs a value")
        values[name] = value
    return values


def refuse(rest: list[str]) -> None:
    if rest:
        raise UserError(f"unexpected argument '{rest[0]}'")


def main() -> None:
    args, rest = parser().parse_known_args()
    try:
        COMMANDS[args.command](args, rest)
    except UserError as error:
        print(f"openjepa: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK + NETWORK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        what = "the network, or the disk behind it" if error.errno in NETWORK else "the disk"
        print(printable(f"openjepa: {where}{error.strerror}: see to {what}, and run the same command"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("openjepa: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

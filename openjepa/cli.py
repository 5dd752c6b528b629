"""The commands: parse, call, say what comes next."""

from __future__ import annotations

import argparse
import errno
import sys
from pathlib import Path
from typing import Any

from openjepa import __version__
from openjepa.engine import slurm
from openjepa.errors import UserError, nearest, printable

SPEC = "folder, FILE.parquet, shard-{0000..0009}.tar, hf:NAME[:SPLIT], torchvision:NAME[:SPLIT], clevr:ROOT[:SPLIT] or scenes[:N]"

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
            pretrain(recipe, data, out, Console())
            if parallel.rank() == 0:
                print(f"pictures: {report(out)}\nnext: openjepa evaluate {out} --train SPEC --test SPEC")
    except Interrupted as stop:
        if parallel.launched()[0] == 0:
            print(f"stopped: {stop}; the same command goes on", file=sys.stderr)
        sys.exit(stop.status)


def training(args: argparse.Namespace, values: dict[str, str], processes: int) -> tuple[Any, str, Path]:
    """What is to be trained by so many processes: recipe, images, run."""
    from openjepa.recipes.pretrain import saved_data, saved_recipe
    from openjepa.recipes.recipe import of_processes, override

    out = Path(args.out)
    recipe, of_one_process = chosen(args)
    if recipe and of_one_process:
        recipe = of_processes(recipe, processes)
    recipe = recipe or (saved_recipe(out) if (out / "recipe.yaml").exists() else None)
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


def report(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.report import report

    refuse(rest)
    print(f"pictures: {report(Path(args.run))}")


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
    if args.name:
        print(to_yaml(named(args.name)), end="")
        return
    for name, make in RECIPES.items():
        print(f"{name:24} {(make.__doc__ or '').strip().splitlines()[0]}")


def bench(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.bench.measure import measure
    from openjepa.engine.run import Interrupted

    plot, out = (Path(file) if file else None for file in (args.plot, args.out))
    asked = {name: getattr(args, name) for name in ("test", "methods", "budget", "seeds")}
    if args.what == "compare":
        asked["values"] = pairs(rest)
    else:
        refuse(rest)
    try:
        measure(args.what, peer=args.against, spec=args.data, plot=plot, out=out, as_json=args.json, **asked)
    except Interrupted as stop:
        print("stopped: nothing of this measurement is kept", file=sys.stderr)
        sys.exit(stop.status)


COMMANDS = {
    "demo": demo,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "finetune": finetune,
    "import": import_,
    "export": export,
    "report": report,
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

    p = commands.add_parser("report", help="draw a run into RUN/report.html")
    p.add_argument("run", metavar="RUN")

    p = commands.add_parser("pack", help="turn images into tar shards with an index, for any disk or store")
    p.add_argument("source", metavar="SPEC", help=SPEC)
    p.add_argument("out", metavar="OUT", help="a new folder")
    p.add_argument("--shard-size", type=int, default=256, metavar="MB", help="of a shard, at most: 256 unless told")

    p = commands.add_parser("replay", help="compute once more a step that stopped a run, and say where it went wrong")
    p.add_argument("step", metavar="RUN/bad_steps/step-N")

    p = commands.add_parser("recipes", help="list the recipes, or print one")
    p.add_argument("name", nargs="?")

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
    p.add_argument("--plot", metavar="FILE.png", help="scaling, compare, fleet: draw it")
    p.add_argument("--json", action="store_true", help="print all numbers as JSON")
    p.add_argument("--out", metavar="FILE", help="add them to a JSON file, one for a machine")
    return top


def how(p: argparse.ArgumentParser) -> None:
    """Options of the commands that read labelled images with an encoder."""
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
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes that load images: beside a GPU up to 8 unless told"
    )


def chosen(args: argparse.Namespace) -> tuple[Any, bool]:
    """The recipe that --recipe or --config names, or None; and whether its batch size is that of one process."""
    if args.recipe and args.config:
        raise UserError("give --recipe or --config, not both")
    if args.recipe:
        return named(args.recipe), False
    return read(Path(args.config)) if args.config else (None, False)


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

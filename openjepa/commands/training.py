"""The commands that train: demo, pretrain, pack, replay, recipes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openjepa.commands.options import AUTO, SPEC, automatic, chosen, for_one_process, named, pairs, refuse, together
from openjepa.engine import slurm
from openjepa.errors import UserError


def pretrain(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.engine import parallel
    from openjepa.recipes.pretrain import pretrain
    from openjepa.recipes.report import report

    if any(word.startswith("--slurm.") for word in rest):
        submit(args, rest)
        return
    with together():
        recipe, data, out = training(args, pairs(rest), parallel.world_size())
        if recipe.method == "rcdm":
            raise UserError(f"a decoder is made for a run: openjepa decode train RUN --data {data} --out {out}")
        pretrain(recipe, data, out, Console())
        if parallel.rank() == 0:
            print(f"pictures: {report(out)}\nnext: openjepa evaluate {out} --train SPEC --test SPEC")


def training(args: argparse.Namespace, values: dict[str, str], processes: int) -> tuple[Any, str, Path]:
    """What is to be trained by so many processes: recipe, images, run."""
    from openjepa.engine.whole import refuse_unwritable
    from openjepa.recipes.budget import seconds_of
    from openjepa.recipes.pretrain import refuse_stranger, saved_data, saved_recipe
    from openjepa.recipes.recipe import of_processes, override

    out = Path(args.out)
    begun = (out / "recipe.yaml").exists()
    if args.budget and args.recipe != AUTO:
        raise UserError(f"--budget is of {AUTO}: others say how long they train, --schedule.epochs")
    recipe, of_one_process = None, False
    if args.recipe == AUTO and begun:
        seconds_of(args.budget or "30min")
        longer = "; another budget wants another --out" if args.budget else ""
        print(f"{out} goes on by the recipe that it began with{longer}", flush=True)
    else:
        if args.recipe == AUTO:  # before a minute of measuring
            refuse_stranger(out)
            refuse_unwritable(out)
        recipe, of_one_process = chosen(args, processes, values)
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
    if args.recipe == AUTO:
        raise UserError(for_one_process())
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
        with together():
            recipe = automatic(args.data, args.budget) if args.name == AUTO else named(args.name)
        print(to_yaml(recipe), end="")
        return
    print(f"{AUTO:24} Chosen for your images, this machine and a time: --data SPEC --budget 30min; says why.")
    for name, make in RECIPES.items():
        print(f"{name:24} {(make.__doc__ or '').strip().splitlines()[0]}")


def add(commands: Any) -> None:
    """Their options."""
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
    p.add_argument(
        "--budget",
        metavar="TIME",
        help=f"with {AUTO}: of training, after a minute or two of measuring: 30min unless told",
    )
    p.add_argument("--out", metavar="RUN", required=True)

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

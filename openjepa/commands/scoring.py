"""The commands that score with labels: evaluate, finetune, labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openjepa.commands.options import COMPILE, height_and_width, looking, pairs


def evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.evaluation import Question, evaluate

    names = ("source", "train", "test", "suite", "network", "tokens", "precision", "device", "seed", "squash", "fresh",
             "workers", "compile")  # fmt: skip
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


def labels(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.labels import Asked, labels, rates_in

    names = ("source", "train", "test", "recipe", "task", "network", "squash", "precision", "device", "seed", "workers",
             "labels", "draws", "min_steps", "scratch_steps")  # fmt: skip
    asked = Asked(
        **{name: getattr(args, name) for name in names},
        share=args.crop,
        out=Path(args.out),
        rates=rates_in(args.rates),
    )
    labels(asked, pairs(rest), Console())


def add(commands: Any) -> None:
    """Their options."""
    p = commands.add_parser(
        "evaluate",
        help="score an encoder beside random weights and raw pixels",
        epilog="Any value of a protocol: --linear.epochs 100, --knn.ks 10,20 (docs/evaluation.md lists them)",
    )
    p.add_argument("source", metavar="RUN", help="or anything that was exported or can be imported")
    p.add_argument(
        "--train", metavar="SPEC", help="labelled images that probes learn from; any images for quality alone"
    )
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
    p.add_argument("--compile", action="store_true", help=COMPILE)
    p.add_argument(
        "--tokens",
        choices=("patches", "class"),
        default="patches",
        help="what features of whole images are of: pooled patches, or the class token that MAE and iBOT have",
    )

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
        "labels",
        help="accuracy against the number of labels, beside the same network trained from scratch",
        epilog="Any value: --finetune.lr 1e-4, --scratch.epochs 20, --linear.epochs 50 (docs/evaluation.md)",
    )
    p.add_argument("source", metavar="RUN", help="or anything that was exported or can be imported")
    p.add_argument("--train", metavar="SPEC", required=True, help="labelled images, of which shares are learned from")
    p.add_argument("--test", metavar="SPEC", required=True)
    p.add_argument(
        "--out", metavar="DIR", required=True, help="of labels.json and labels.png; goes on where it stopped"
    )
    p.add_argument(
        "--labels", default="1%,10%,100%", metavar="SHARES", help="of each class: 1%%,10%%,100%% unless told"
    )
    p.add_argument("--draws", type=int, default=3, metavar="N", help="of each share below all: 3 unless told")
    p.add_argument(
        "--recipe", default="small", metavar="NAME", help="small (the default, for CPUs), or a recipe of finetune"
    )
    p.add_argument(
        "--min-steps", type=int, default=1000, metavar="N", help="of fine-tuning at least, and twice from scratch: 1000"
    )
    p.add_argument(
        "--scratch-steps",
        type=int,
        default=0,
        metavar="N",
        help="from scratch at least, at every share: as many as pretraining had make it the stricter question",
    )
    p.add_argument(
        "--rates",
        default="1",
        metavar="FACTORS",
        help="of the learning rates, such as 0.3,1,3: each share chooses among them on a fifth of its labels",
    )
    p.add_argument("--task", metavar="NAME", help="which labels, where there are several sets")
    how(p)


def how(p: argparse.ArgumentParser) -> None:
    """Options of the commands that read labelled images with an encoder."""
    looking(p)
    p.add_argument("--seed", type=int, default=0)

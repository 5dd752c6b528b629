"""The commands that look at a run: report, studio, inspect, surprise."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openjepa.commands.options import refuse, whole_numbers
from openjepa.errors import needs


def report(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.report import report

    refuse(rest)
    print(f"pictures: {report(Path(args.run), Path(args.decoder) if args.decoder else None)}")


def studio(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.studio.serve import refuse_taken, serve
    from openjepa.studio.studio import Studio

    refuse(rest)
    with needs("studio"):
        import gradio  # noqa: F401  # missing, it is told before anything is loaded
    refuse_taken(args.host, args.port)
    serve(Studio(args.run, args.decoder, args.table, args.data, args.device), args.host, args.port)


def inspect(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.recipes.inspect import Looking, inspect

    refuse(rest)
    names = ("run", "images", "reference", "attention_block", "squash", "device")
    asked = Looking(
        **{name: getattr(args, name) for name in names},
        out=Path(args.out),
        patches=tuple(whole_numbers("--patch", patch, 2) for patch in args.patch),
        block=whole_numbers("--block", args.block, 2),
        share=args.crop,
    )
    found = inspect(asked)
    for note in found.notes:
        print(f"note: {note}")
    for name, what in found.pictures.items():
        print(f"{asked.out / name}  {what}")
    print(f"all on one page: {asked.out / 'index.html'}")


def surprise(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.oddity import Question, score_images

    refuse(rest)
    names = ("run", "reference", "data", "task", "normal", "stride", "squash", "precision", "device")
    question = Question(
        **{name: getattr(args, name) for name in names},
        out=Path(args.out),
        draw=Path(args.draw) if args.draw else None,
        block=whole_numbers("--block", args.block, 2),
        share=args.crop,
    )
    score_images(question, Console())


def add(commands: Any) -> None:
    """Their options."""
    p = commands.add_parser("report", help="put all that a run holds on one page, RUN/report.html")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--decoder", metavar="DECODER", help="of this run: one in its folder or beside it unless told")

    p = commands.add_parser("studio", help="a page on a run: drag a block, see what is expected there, click, search")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--decoder", metavar="DECODER", help="of this run: its samples are shown")
    p.add_argument("--table", metavar="TABLE", help="of this run's features, by search build or embed: it is searched")
    p.add_argument("--data", metavar="SPEC", help="images to choose from and compare with: the run's own unless told")
    p.add_argument("--host", default="127.0.0.1", help="this machine alone unless told; 0.0.0.0 is every network")
    p.add_argument("--port", type=int, default=7860, help="7860 unless told")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")

    p = commands.add_parser(
        "inspect", help="draw what a run makes of some images: masks, PCA, attention, surprise, neighbours"
    )
    p.add_argument("run", metavar="RUN")
    p.add_argument("images", metavar="IMAGE", nargs="+", help="files, or a SPEC of a few images")
    p.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")
    p.add_argument(
        "--patch", metavar="ROW,COLUMN", action="append", default=[],
        help="whose attention and likeness is drawn, from 0, perhaps several times: the middle unless told",
    )  # fmt: skip
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
    p.add_argument("--draw", metavar="FILE.png", help="a picture of the images of the highest scores, with their maps")
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


def looked(p: argparse.ArgumentParser) -> None:
    """Options of the commands that look at single images with all networks of a run."""
    p.add_argument(
        "--block",
        metavar="ROWS,COLUMNS",
        help="patches that are hidden together: by the run's masking.target_scale unless told",
    )
    p.add_argument(
        "--crop", type=float, default=1.0, metavar="SHARE", help="0.875 is resize 256, crop 224; 1 unless told"
    )
    p.add_argument("--squash", action="store_true", help="the whole image without keeping its aspect")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")

"""The commands of many images' features: embed, search."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from openjepa.commands.options import COMPILE, SPEC, height_and_width, looking, refuse, whole_numbers
from openjepa.errors import UserError


def embed(args: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from openjepa.recipes.embedding import Embedding, embed, skipped_file

    refuse(rest)
    names = ("run", "data", "layers", "pool", "half", "network", "squash", "precision", "device", "workers", "compile")
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
        from openjepa.see.files import refuse_picture

        refuse_picture(Path(args.draw), "--draw", [getattr(args, "image", "")])
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

    if args.n < 1:
        raise UserError(f"-n {args.n}: give 1 or more")
    found = duplicates(table, args.above, pick_device(args.device))
    if args.json:
        print(json.dumps([[hit.said() for hit in group] for group in found], indent=1))
    else:
        print(f"{len(found)} groups of {sum(map(len, found))} images, alike to {args.above} or more")
        for group in found[: args.n]:
            say(group, False)
    if args.draw and not found:
        print("nothing to draw", file=sys.stderr)
    elif args.draw:
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


def add(commands: Any) -> None:
    """Their options."""
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
    p.add_argument("--compile", action="store_true", help=COMPILE)
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


def searched(q: argparse.ArgumentParser) -> None:
    """What all searches need."""
    q.add_argument(
        "table", metavar="TABLE", help="of search build, or FEATURES.parquet: its table is then made beside it"
    )
    q.add_argument("--draw", metavar="FILE.png", help="a contact sheet")
    q.add_argument("--data", metavar="SPEC", help="the images, where they are no longer where they were: for --draw")
    q.add_argument("--json", action="store_true", help="print JSON")
    q.add_argument("--device", default="auto", help="cpu, cuda, mps; auto takes a GPU if there is one")

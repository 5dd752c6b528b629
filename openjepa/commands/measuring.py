"""The command that measures this machine: bench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from openjepa.commands.options import pairs, refuse
from openjepa.errors import UserError


def bench(args: argparse.Namespace, rest: list[str]) -> None:
    from openjepa.bench.measure import measure
    from openjepa.engine.run import Interrupted

    for flag, given in vars(args).items():
        if given == "" or (flag == "kept" and given and "" in given.split(",")):
            raise UserError(f"--{flag} is empty: give it a value, or leave it out")
    plot, out = (Path(file) if file else None for file in (args.plot, args.out))
    asked = {name: getattr(args, name) for name in ("test", "methods", "budget", "seeds", "looks", "kept")}
    if args.what == "compare":
        asked["values"] = pairs(rest)
    else:
        refuse(rest)
    beside = [f"--{name}" for name in ("data", *asked) if name not in ("kept", "values") and getattr(args, name)]
    if args.kept and (beside or rest):
        raise UserError(f"--kept measures nothing: leave {' and '.join(beside or rest[:1])} out")
    try:
        measure(args.what, peer=args.against, spec=args.data, plot=plot, out=out, as_json=args.json, **asked)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(stop.status)


def add(commands: Any) -> None:
    """Their options."""
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
    p.add_argument(
        "--kept",
        metavar="FILES",
        help="compare: draw what --out kept, and measure nothing: a.json,b.json",
    )
    p.add_argument("--plot", metavar="FILE.png", help="scaling, compare, fleet: draw it")
    p.add_argument("--json", action="store_true", help="print all numbers as JSON")
    p.add_argument("--out", metavar="FILE", help="add them to a JSON file, one for a machine")

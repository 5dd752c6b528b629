"""`openjepa bench`: every measurement by its name; what it found is printed, drawn, and kept beside others."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from openjepa.bench import parts
from openjepa.bench.clock import Rows
from openjepa.bench.compare import compare, kept_rows
from openjepa.bench.cost import batches, iteration, scaling, start
from openjepa.bench.data import data
from openjepa.bench.evaluate import evaluate
from openjepa.bench.fleet import fleet
from openjepa.bench.peers import against
from openjepa.bench.soak import soak
from openjepa.bench.train import profile, techniques, train
from openjepa.engine.run import Interrupted, environment
from openjepa.engine.whole import refuse_unwritable, write_whole
from openjepa.errors import UserError, first_line, nearest

COLUMNS = 8  # of a table that a terminal can hold
WAYS = 5  # as many columns of quantities
PICTURES = (".png", ".svg", ".pdf")

BENCHES: dict[str, Callable[..., Rows]] = {
    "train": train,
    "techniques": techniques,
    "profile": profile,
    "data": data,
    "masks": parts.masks,
    "checksum": parts.checksum,
    "evaluate": evaluate,
    "probe": parts.probe,
    "scaling": scaling,
    "batches": batches,
    "iteration": iteration,
    "fleet": fleet,
    "start": start,
    "attention": parts.attention,
    "context": parts.context,
    "ragged": parts.ragged,
    "scenes": parts.scenes,
    "soak": soak,
    "compare": compare,
}
LONG = ("compare",)  # those whose rows are kept as they come
FIGURES = {"scaling": "cost_figure", "compare": "comparison_figure", "fleet": "fleet_figure"}
NAMED = ("test", "methods", "budget", "seeds", "looks")  # of what was asked, that tells one measurement from another


def measure(what: str, *, peer: str | None = None, spec: str | None = None, plot: Path | None = None, out: Path | None = None,
            as_json: bool = False, kept: str | None = None, **asked: Any) -> None:  # fmt: skip
    """Measure and say what was found. peer, spec, plot, asked: of some measurements alone; out: a file of many measurements.

    kept: files of comparisons, which are shown as one, while nothing is measured.
    Raises UserError, before anything is measured, for what could not be kept; Interrupted, saying what of it was.
    """
    if what not in BENCHES:
        raise UserError(f"unknown measurement '{what}': one of {', '.join(BENCHES)}{nearest(what, BENCHES)}")
    flags = [
        ("--against", peer, ("train",)),
        ("--data", spec, ("data", "compare", "fleet")),
        ("--plot", plot, (*FIGURES,)),
        ("--kept", kept, ("compare",)),
    ]
    for flag, given, whose in [*flags, *((f"--{name}", value, ("compare",)) for name, value in asked.items())]:
        if given and what not in whose:
            raise UserError(f"{flag} goes with bench {' and '.join(whose)}")
    if plot:
        if plot.suffix not in PICTURES or not plot.absolute().parent.is_dir() or plot.is_dir():
            raise UserError(f"--plot {plot}: a name that ends in {', '.join(PICTURES)}, in a folder that is there")
        refuse_unwritable(plot.parent)
    if out:
        measurements(out)
        make(out.parent)
    given = {name: value for name, value in asked.items() if value}
    values = [f"{key}={value}" for key, value in asked.get("values", {}).items()]
    name = ", ".join([what, *filter(None, (peer, spec)), *(f"{v}" for k, v in given.items() if k in NAMED), *values])
    command = shlex.join(["openjepa", *sys.argv[1:]])
    record: dict[str, Any] = {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "environment": environment(),
        "rows": [],
    }
    if out and what in LONG:
        record = begun(out, name, record)

        def keep(rows: Rows) -> None:
            record["rows"] = rows
            add(out, unfinished(name), record)

        given |= {"begun": record["rows"], "keep": keep}
    try:
        if kept:
            rows = kept_rows([*map(Path, kept.split(","))])
        else:
            rows = against(peer) if peer else BENCHES[what](spec, **given) if spec else BENCHES[what](**given)
    except Interrupted as stop:
        left = f"{len(record['rows'])} rows are kept in {out}: the same command goes on"
        raise Interrupted(left if record["rows"] else "nothing of this measurement is kept", stop.status) from stop
    record["rows"] = rows
    if as_json:
        print(json.dumps({"bench": name, **record}, indent=1))
    else:
        for part in tables(name, rows):
            Console().print(part)
    if out:
        add(out, name, record, gone=unfinished(name))
    if plot:
        from openjepa.see import figures

        getattr(figures, FIGURES[what])(rows).savefig(plot, dpi=150)


def measurements(file: Path) -> dict[str, Any]:
    """The measurements that a file holds. Raises UserError for another kind of file, or where none can be written."""
    refuse_unwritable(file.parent)
    try:
        found = {**json.loads(file.read_text())} if file.exists() else {}
        if odd := [name for name, record in found.items() if not isinstance(record, dict)]:
            raise ValueError(f"'{odd[0]}' is none")
        return found
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--out {file} holds no measurements: {first_line(error)}") from error


def add(file: Path, name: str, record: Mapping[str, Any], gone: str | None = None) -> None:
    """Keep a measurement beside others, in place of an earlier one by its name, and of another that is `gone` with it.

    Raises UserError where it cannot be written.
    """
    others = {key: value for key, value in measurements(file).items() if key != gone}
    try:
        write_whole(file, json.dumps({**others, name: record}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {file} could not be written: {first_line(error)}") from error


def make(folder: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {first_line(error)}") from error


def unfinished(name: str) -> str:
    """The name that a long measurement has in a file until it is done."""
    return f"{name} (unfinished)"


def begun(file: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record with the rows that the same question has kept, if it was stopped in the same environment."""
    before = measurements(file).get(unfinished(name))
    if before is None:
        return record
    if before.get("environment") != record["environment"]:
        print(f"{file}: what was kept is another environment's: all is measured anew", file=sys.stderr)
        return record
    record = {**record, **before}
    print(f"{file}: going on after {len(record['rows'])} rows", file=sys.stderr)
    return record


def tables(name: str, rows: Rows) -> list[Table]:
    """A line a row; or, of rows with many quantities, a line a quantity, in a table for each value of the first."""
    if len(rows[0]) <= COLUMNS:
        return [table(f"bench {name}", [[*rows[0]], *([shown(value) for value in row.values()] for row in rows)])]
    if len(rows) <= WAYS:
        return [across(f"bench {name}", rows)]
    first = next(iter(rows[0]))
    parts: dict[str, Rows] = {}
    for row in rows:
        parts.setdefault(row[first], []).append({key: value for key, value in row.items() if key != first})
    return [across(f"bench {name}: {value}", part) for value, part in parts.items()]


def across(title: str, rows: Rows) -> Table:
    """A column a row."""
    return table(title, [[key, *(shown(row.get(key, "")) for row in rows)] for key in dict.fromkeys(chain(*rows))])


def table(title: str, lines: list[list[str]]) -> Table:
    """The first line is the head. Words are folded where there is no room, numbers never."""
    out = Table(title=title, padding=(0, 0, 0, 1))
    for head, *cells in zip(*lines, strict=True):
        numbers = [cell for cell in cells if re.fullmatch(r"[-+.\de]*", cell)]
        out.add_column(head.replace(" ", "\n"), overflow="fold", min_width=max(map(len, numbers), default=1))
    for line in lines[1:]:
        out.add_row(*line)
    return out


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"

"""The questions asked of every subject, the answers that are kept, and the table of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from openjepa.evaluate.features import short_hash
from openjepa.evaluate.scores import SHARES
from openjepa.evaluate.subjects import Bench, Subject, tasks
from openjepa.models.encoder import Encoder

if TYPE_CHECKING:  # protocols import every library that one of them needs; a report needs none
    from openjepa.evaluate.protocols import Asked

VERSION = 1  # of the protocols: an answer of another version is asked again


# ---------------------------------------------------------------- questions and answers


def evaluate(encoders: dict[str, Encoder], bench: Bench, protocols: Sequence[Asked], known: Sequence[dict[str, Any]],
             console: Console, names: Sequence[str] | None = None) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Ask every protocol about every encoder, and raw pixels, on every task that is of its kind.

    encoders: by the name they get in the results. known: earlier records; what they answer is not asked again. names: of the
    tasks, or all. Yields the records of one question after the other, none on ranks that only help to make features. Raises
    UserError for missing labels, or classes that the test set alone has.
    """
    found = {kind: tasks(bench.train, bench.test, kind, names) for kind in dict.fromkeys(p.kind for p in protocols)}
    before = {} if bench.fresh else by_question(known)
    reused = shared = 0
    for name in [*encoders, "raw pixels"]:
        subject = Subject(name, encoders.get(name), bench, console)
        if bench.share[0] > 0:
            _ = subject.train, subject.test
            continue
        for protocol in protocols:
            for task in found[protocol.kind] if subject.encoder or protocol.pixels else []:
                question = short_hash(
                    {
                        "version": VERSION,
                        "subject": subject.extractor.identity,
                        "images": subject.contents,
                        "task": task.identity,
                        "protocol": protocol.name,
                        "config": asdict(protocol.config),
                        "lists": getattr(protocol.config, "contents", None),
                        "precision": bench.precision,
                        "seed": bench.seed,
                    }
                )
                shared = max(shared, subject.shared_images)
                if question in before:
                    reused += 1
                    yield before[question]
                    continue
                start = time.perf_counter()
                answers = protocol.run(protocol.config, subject, task, bench)
                about = {
                    "task": task.name,
                    "protocol": protocol.name,
                    "changed": protocol.changed,
                    "of": name,
                    "view": {"size": bench.view.size, "share": bench.view.share, "squash": bench.view.squash},
                    "images": {"train": len(bench.train), "test": len(bench.test), "shared": subject.shared_images},
                    "classes": task.classes,
                    "config": asdict(protocol.config),
                    "question": question,
                    "seconds": round(time.perf_counter() - start, 2),
                }
                yield [{**about, **asdict(answer)} for answer in answers]
    if reused:
        console.print(f"{reused} answers were there already (--fresh asks anew)", highlight=False)
    if shared and any(p.kind != "none" for p in protocols):  # quality scores no test images
        console.print(in_both(shared), style="yellow", highlight=False)


def in_both(shared: int) -> str:
    return f"warning: {shared} test images are in the training set, too"


def by_question(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if "question" in record:
            found.setdefault(record["question"], []).append(record)
    return found


# ---------------------------------------------------------------- the table


def rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Subjects, and a row of cells for each task, protocol and metric; a mean for tasks that share a protocol's metric."""
    subjects = list(dict.fromkeys(r["of"] for r in records))
    lines: list[list[str]] = []
    for protocol, metric in dict.fromkeys((spelled(r), r["metric"]) for r in records):
        mine = [r for r in records if (spelled(r), r["metric"]) == (protocol, metric)]
        value = {(r["task"], r["of"]): r for r in mine}
        names = list(dict.fromkeys(r["task"] for r in mine))
        unit = f"{metric}, %" if metric in SHARES else metric
        for task in names:
            lines.append([task, protocol, unit, *(cell(value.get((task, s))) for s in subjects)])
        if len(names) > 1:
            means = [[value[t, s]["value"] for t in names if (t, s) in value] for s in subjects]
            lines.append(["mean", protocol, unit, *(shown(sum(m) / len(m), metric) if m else "" for m in means)])
    return subjects, lines


def spelled(record: dict[str, Any]) -> str:
    """The protocol, and the values that are not its own: lowshot:1% (per_class 10)."""
    changed = record.get("changed")
    return record["protocol"] + (f" ({changed})" if changed else "")


def cell(record: dict[str, Any] | None) -> str:
    """54.9 ± 1.0 where there is an interval, 36.8 (sd 0.8) where there are several draws."""
    if record is None:
        return ""
    metric, text = record["metric"], shown(record["value"], record["metric"])
    if record["spread"] is not None:
        return f"{text} (sd {shown(record['spread'], metric)})"
    low, high = record["interval"] or (0, 0)
    return text + (f" ± {shown((high - low) / 2, metric)}" if high > low else "")


def shown(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if metric in SHARES else f"{value:.2f}"


def table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """Every subject beside its controls, 95 % intervals over the test set."""
    subjects, lines = rows(records)
    out = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("task", "protocol", "metric"):
        out.add_column(heading, overflow="fold")
    for heading in subjects:
        out.add_column(heading, justify="right")
    for line in lines:
        mean = line[0] == "mean"
        out.add_row(*line, style="bold" if mean else None, end_section=mean)
    return out

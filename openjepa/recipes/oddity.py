"""`openjepa surprise`: scores of images by their most surprising patch, maps of each, and what these are worth."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openjepa.data.sources import Source, open_source
from openjepa.engine.device import Precision, pick_workers
from openjepa.engine.run import environment
from openjepa.engine.whole import refuse_unwritable, write_whole
from openjepa.errors import UserError, nearest
from openjepa.evaluate import anomalies, suite
from openjepa.evaluate.anomalies import Levels, image_auroc
from openjepa.evaluate.features import Images, View, refuse_unreadable
from openjepa.evaluate.scores import IGNORED
from openjepa.evaluate.surprise import Remains, Surprise, pixels, score
from openjepa.evaluate.views import Maps
from openjepa.masking import Grid
from openjepa.methods.ijepa import IJEPA
from openjepa.recipes.exchange import Trained, load_run
from openjepa.recipes.pretrain import build
from openjepa.recipes.surprise import Judge, Judged, batches, judge_of, reference_images, surprise_of, usual_of, view_of
from openjepa.see.files import refuse_picture, save_picture
from openjepa.see.pictures import surprise_figure

EVERY = 20.0  # seconds between lines that tell how far it is
SHOWN = 8  # images of the highest scores that are drawn
NORMAL = ("normal", "good", "ok", "background")  # names of the class that is not odd


@dataclass(frozen=True, kw_only=True)
class Question:
    """What `openjepa surprise` is asked."""

    run: str
    reference: str
    data: str
    out: Path
    task: str | None = None  # labels or masks that say what is odd
    normal: str | None = None  # the class of them that is not
    block: Grid | None = None  # patches that are hidden together; none: as large as the run's own targets
    stride: int = 1
    share: float = 1.0
    squash: bool = False
    draw: Path | None = None  # a picture of the highest scores
    precision: Precision | None = None  # none: the run's
    device: str = "auto"


# ---------------------------------------------------------------- what is odd


@dataclass(frozen=True)
class Truth:
    """Which images are odd, and where, if masks say so. odd: bool [n]; masks: where is 0 for what is usual, of the view's size."""

    task: str
    normal: str
    odd: np.ndarray
    masks: Callable[[int], np.ndarray] | None

    def of(self, chosen: Sequence[int] | np.ndarray) -> Truth:
        """Of some of the images."""
        index, masks = np.asarray(chosen), self.masks
        return replace(self, odd=self.odd[index], masks=masks and (lambda i: masks(int(index[i]))))


def truth_of(source: Source, view: View, task: str | None, normal: str | None) -> Truth | None:
    """What labels or masks of a set say; None where nothing does. Raises UserError for what is asked for and not there."""
    known = {**source.classes, **{name: classes for name, classes in source.maps.items() if classes}}
    if task is not None and task not in known:
        there = (
            f"there are {', '.join(sorted(known))}{nearest(task, known)}"
            if known
            else "it has neither labels nor masks"
        )
        raise UserError(f"--task {task}: no such labels or masks: {there}")
    asked = [task] if task else [name for name in known if name in source.maps] + list(source.classes)
    for name in asked:
        classes = known[name]
        usual = normal or next((c for c in classes if c.lower() in NORMAL), None)
        if usual in classes:
            return told(source, view, name, usual)
        if task:
            raise UserError(f"which class of '{task}' is the usual one? --normal NAME: {', '.join(classes[:20])}")
    if normal:
        raise UserError(f"--normal {normal}: no labels or masks have such a class")
    return None


def told(source: Source, view: View, task: str, normal: str) -> Truth:
    if task not in source.maps:
        return Truth(task, normal, source.labels[task] != source.classes[task].index(normal), None)
    maps, number = Maps(source, task), (source.maps[task] or []).index(normal)

    def mask(index: int) -> np.ndarray:
        values = maps.seen(index, view.box, view.size).numpy()
        return np.where(values == number, 0, np.where(values == IGNORED, IGNORED, 1))

    odd = np.array([(mask(i) == 1).any() for i in range(len(source))])
    return Truth(task, normal, odd, mask)


# ---------------------------------------------------------------- the command


def score_images(question: Question, console: Console) -> list[dict[str, Any]]:
    """Write scores and maps to OUT.parquet, and what they are worth to OUT.json where something says what is odd.

    Returns the records of the latter. Raises UserError.
    """
    refuse_other_than_scores(question.out)
    if question.draw:
        refuse_picture(question.draw, "--draw")
    trained = load_run(question.run)
    surprise = surprise_of(trained, question.block, question.stride, question.precision, question.device)
    size = trained.recipe.model.image_size
    reference, source = open_source(question.reference, size), open_source(question.data, size)
    views = [view_of(trained, s, question.share, question.squash) for s in (reference, source)]
    truth = truth_of(source, views[1], question.task, question.normal)
    judge = judge_of(surprise, trained, reference, views[0])
    workers, unread = pick_workers(None, surprise.blocks.device), list[int]()
    every = Images(source, np.arange(len(source)), views[1], skip_bad=True)
    parts = [judge(batch) for batch in counted(batches(every, workers, unread), len(every), console)]
    if not parts:
        refuse_unreadable(every)
    found = Judged(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    images = Images(source, np.delete(every.indices, unread), views[1])
    truth = truth and truth.of(images.indices)
    write_scores(question, trained, images, found, truth)
    console.print(f"{len(found.scores)} images scored, {question.out}", highlight=False, soft_wrap=True)
    if unread:
        text = f"{len(unread)} left out, which cannot be read, the first is {source.name(unread[0])}"
        console.print(text, highlight=False, soft_wrap=True)
    if question.draw:
        draw(question.draw, images, found, judge, truth)
        console.print(f"drawn: {question.draw}", highlight=False, soft_wrap=True)
    if truth is None:
        text = "nothing says what is odd in these images (--task and --normal name labels or masks)"
        console.print(text, highlight=False, soft_wrap=True)
        return []
    records = worth(found.unusual, truth, "surprise") + worth(found.energies, truth, "bare energy")
    for name, remains in controls(trained, surprise):
        usual = usual_of(remains, reference_images(reference, views[0]), workers)
        maps = np.concatenate([usual(remains(batch)) for batch in batches(images, workers)])
        records += worth(maps.reshape(found.unusual.shape), truth, name)
    about = {
        "command": shlex.join(["openjepa", *sys.argv[1:]]),
        "run": question.run, "step": trained.step, "reference": question.reference, "data": question.data,
        "task": truth.task, "normal": truth.normal, "environment": environment(), "results": records,
    }  # fmt: skip
    write_whole(question.out.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    title = f"surprise of {question.run} at step {trained.step}, {question.data}, {int(truth.odd.sum())} of {len(found.scores)} odd"
    console.print(table(records, title))
    console.print(f"written to {question.out.with_suffix('.json')}", highlight=False, soft_wrap=True)
    return records


def counted(parts: Iterable[Tensor], count: int, console: Console) -> Iterator[Tensor]:
    """The same, and how many there were so far, now and then."""
    done, last = 0, time.monotonic()
    for part in parts:
        yield part
        done += len(part)
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            console.print(f"{done:,} of {count:,} images", highlight=False)


def controls(trained: Trained, surprise: Surprise) -> Iterator[tuple[str, Remains]]:
    """What the score is worth without its parts: nothing predicted, nothing learned, pixels; all judged by the same reference."""
    yield "nothing predicted", surprise.features
    begun = cast(IJEPA, build(trained.recipe).eval().requires_grad_(False)).to(surprise.blocks.device)
    yield (
        "random weights",
        Surprise(begun, surprise.normalise, surprise.autocast, surprise.block, surprise.stride).remains,
    )
    yield "raw pixels", partial(pixels, patch=trained.recipe.model.patch_size)


def worth(maps: np.ndarray, truth: Truth, of: str) -> list[dict[str, Any]]:
    """How well images and places are told, of maps [n, rows, columns]."""
    answers = [image_auroc(score(maps), truth.odd)]
    if truth.masks:
        first = truth.masks(0)
        levels = Levels.of(maps)
        for i, values in enumerate(maps):
            levels.add(spread(values, first.shape), truth.masks(i))
        answers += levels.answers()
    return anomalies.records(answers, of, truth.task)


def spread(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A map of patches as a map of pixels. [rows, columns] to [H, W]."""
    image = torch.from_numpy(values)[None, None]
    return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def table(records: list[dict[str, Any]], title: str) -> Table:
    """A row for the score and for each control, in percent, 95 % intervals over images."""
    found = {(r["of"], r["metric"]): r for r in records}
    metrics = list(dict.fromkeys(r["metric"] for r in records))
    out = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("%")
    for metric in metrics:
        out.add_column(metric, justify="right")
    for of in dict.fromkeys(r["of"] for r in records):
        out.add_row(of, *(suite.cell(found.get((of, metric))) for metric in metrics))
    return out


def draw(file: Path, images: Images, found: Judged, judge: Judge, truth: Truth | None) -> None:
    """The images of the highest scores, in that order, with their maps and what is odd by its mask outlined."""
    first = np.argsort(-found.scores, kind="stable")[:SHOWN]
    pixels = torch.stack([images[int(i)] for i in first])
    masks = [truth.masks(int(i)) for i in first] if truth and truth.masks else None
    figure = surprise_figure(pixels, found.energies[first], found.unusual[first], judge.usual.scores, masks)
    save_picture(figure, file)


def refuse_other_than_scores(out: Path) -> None:
    """Raises UserError for a place where no scores belong, or where something else lies."""
    import pyarrow.parquet as pq

    refuse_unwritable(out.parent)
    if out.suffix != ".parquet" or out.is_dir():
        raise UserError(f"--out {out}: give a file of the kind .parquet")
    beside = out.with_suffix(".json")
    try:
        kept = not out.exists() or b"1 on average over the reference" in (pq.read_schema(out).metadata or {}).get(
            b"openjepa", b""
        )
        kept = kept and (not beside.exists() or "reference" in json.loads(beside.read_text()))
    except (OSError, ValueError, TypeError):
        kept = False
    if not kept:
        raise UserError(f"{out} or {beside.name} beside it is there and holds no scores: choose another name")


def write_scores(question: Question, trained: Trained, images: Images, found: Judged, truth: Truth | None) -> None:
    """One row an image: id, path, label, score, and two maps, each a list of rows * columns numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (n, rows, columns), source, ids = found.unusual.shape, images.source, [int(i) for i in images.indices]
    task = next((name for name in (truth and truth.task, "label") if name in source.labels), None)
    labels = [source.classes[task][source.labels[task][i]] for i in ids] if task else [None] * n
    about = {
        "rows": rows, "columns": columns, "run": question.run, "step": trained.step,
        "fingerprint": trained.fingerprint(), "reference": question.reference,
        "score": "the largest of map", "map": "1 on average over the reference", "energy": "the run's own loss",
    }  # fmt: skip

    def maps(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), rows * columns)

    fields: dict[str, Any] = {
        "id": pa.array(ids, pa.int64()),
        "path": pa.array([source.name(i) for i in ids], pa.string()),
        "label": pa.array(labels, pa.string()),
        "score": pa.array(found.scores, pa.float32()),
        "map": maps(found.unusual),
        "energy": maps(found.energies),
    }
    if truth:
        fields["odd"] = pa.array(truth.odd)
    table = pa.table(fields).replace_schema_metadata({b"openjepa": json.dumps(about).encode()})
    part = question.out.with_name(question.out.name + ".part")
    question.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        pq.write_table(table, part)
        part.rename(question.out)
    finally:
        part.unlink(missing_ok=True)

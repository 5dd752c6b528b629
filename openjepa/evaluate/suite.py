"""Who is asked what: every subject (an encoder, its controls), every task, every protocol, and the table of answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from openjepa.data.sources import Source
from openjepa.errors import UserError
from openjepa.evaluate import attentive, finetune, knn, linear, lowshot, quality
from openjepa.evaluate.features import (
    BATCH,
    EncoderFeatures,
    Extractor,
    Features,
    Images,
    PixelFeatures,
    View,
    short_hash,
    stored,
)
from openjepa.evaluate.scores import SHARES, Answer, accuracy
from openjepa.evaluate.views import Augmented, Kind, ViewFeed
from openjepa.models.encoder import Encoder
from openjepa.rng import permutation

LAYERS = 4
K = 20  # the k of the table; all of them are in the JSON
VERSION = 1  # of the protocols: an answer of another version is asked again


# ---------------------------------------------------------------- subjects and tasks


@dataclass(frozen=True)
class Bench:
    """What is measured on, and how."""

    train: Source
    test: Source
    view: View
    device: torch.device
    precision: str  # bf16 or fp32
    autocast: Callable[[], AbstractContextManager[Any]]
    workers: int = 0
    share: tuple[int, int] = (0, 1)  # rank, world size
    seed: int = 0
    fresh: bool = False

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        return {"train": self.train.fingerprint(), "test": self.test.fingerprint()}


class Subject:
    """An encoder or the raw pixels, with the features that it has of both sets."""

    def __init__(self, name: str, encoder: Encoder | None, bench: Bench, console: Console) -> None:
        self.name, self.encoder, self.bench, self.console = name, encoder, bench, console
        if encoder:
            encoder.to(bench.device)
            self.extractor: Extractor = EncoderFeatures(encoder, bench.view, bench.autocast, bench.precision, LAYERS)
        else:
            self.extractor = PixelFeatures(bench.view)

    @cached_property
    def train(self) -> Features:
        return self.features("train", self.bench.train)

    @cached_property
    def test(self) -> Features:
        return self.features("test", self.bench.test)

    def features(self, part: str, source: Source) -> Features:
        start = time.perf_counter()
        bench = self.bench
        found = stored(self.extractor, source, bench.fingerprints[part], bench.share, bench.workers, bench.fresh)
        seconds = time.perf_counter() - start
        self.console.print(f"{self.name}: features of {len(found)} {part} images in {seconds:.0f} s", highlight=False)
        return found

    def shared_images(self) -> int:
        """Test images whose contents are in the training set, too."""
        return int(np.isin(self.test.hashes, self.train.hashes).sum())


@dataclass(frozen=True)
class Task:
    """One set of labels, the test's in the training set's numbering. labels: int64 [n], [m]."""

    name: str
    classes: list[str]
    train: Tensor
    test: Tensor


def tasks(train: Source, test: Source) -> list[Task]:
    """All tasks that both sets have. Raises UserError if there is none, or one with classes that the test set alone has."""
    shared = [name for name in train.labels if name in test.labels]
    found = [
        Task(name, train.classes[name], torch.from_numpy(train.labels[name]), matched_labels(train, test, name))
        for name in shared
        if len(train.classes[name]) > 1
    ]
    if not found and shared:
        raise UserError(f"evaluation needs two classes or more: '{train.classes[shared[0]][0]}' is the only one")
    if not found:
        raise UserError("evaluation needs labels in both sets: sub-folders as classes, or a label column")
    return found


def matched_labels(train: Source, test: Source, task: str) -> Tensor:
    """The test labels in the training set's numbering of classes. int64 [m]."""
    number = {name: i for i, name in enumerate(train.classes[task])}
    missing = [name for name in test.classes[task] if name not in number]
    if missing:
        raise UserError(f"the test set has classes that the training set lacks, such as '{missing[0]}'")
    translate = np.array([number[name] for name in test.classes[task]], dtype=np.int64)
    return torch.from_numpy(translate[test.labels[task]])


# ---------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Asked:
    """A protocol with its values. run: from a subject, a task and the bench to answers.

    labels: whether it needs them; without, it is asked once and its task is of no matter. pixels: whether raw pixels can be
    asked, too.
    """

    name: str
    config: Any
    run: Callable[[Any, Subject, Task, Bench], list[Answer]]
    labels: bool = True
    pixels: bool = True


def ask_knn(config: knn.KnnConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    bank, queries = (part.rows(slice(None))[:, -1] for part in (subject.train, subject.test))
    ks = [k for k in config.ks if k <= len(bank)]
    if not ks:
        raise UserError(f"k-NN with k {min(config.ks)} needs as many training images: there are {len(bank)}")
    predicted = knn.knn_predict(bank, task.train, queries, len(task.classes), ks, config.temperature, bench.device)
    by_k = {str(k): float((p == task.test).float().mean()) for k, p in predicted.items()}
    k = K if K in predicted else max(predicted)
    return [accuracy(predicted[k], task.test, len(task.classes), k=k, accuracy_by_k=by_k)]


def ask_linear(config: linear.LinearConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    views = None
    if config.views != "none":
        views = partial(
            ViewFeed, subject.extractor, bench.train, kind=config.views, seed=bench.seed, workers=bench.workers
        )
    half = bench.precision == "bf16"
    probe = linear.Probe(config, subject.train, task.train, len(task.classes), bench.device, half, bench.seed, views)
    result = probe.run(subject.test)
    sweep = [{**asdict(head), "validation_accuracy": value} for head, value in result.sweep]
    about = {"chosen_head": asdict(result.chosen), "sweep": sweep}
    return [accuracy(result.predictions, task.test, len(task.classes), **about)]


def ask_lowshot(config: lowshot.LowShotConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    several = lowshot.draws(config, bench.train, task.train, bench.seed)
    results: dict[str, dict[str, Any]] = {}
    first: dict[str, Tensor] = {}  # draw's predictions: the confusion is theirs
    for method in config.methods:
        if method == "linear":
            fits = [lowshot.logistic(config, subject.train, task.train, rows, subject.test) for rows in several]
        elif subject.encoder:
            fits = [(finetuned(config.finetune, subject, task, bench, rows), {}) for rows in several]
        else:
            continue
        shares = [float((predictions == task.test).float().mean()) for predictions, _ in fits]
        results[method] = {
            "accuracy": float(np.mean(shares)),
            "spread": float(np.std(shares, ddof=1)) if len(shares) > 1 else None,
            "draws": [{"accuracy": share, **about} for share, (_, about) in zip(shares, fits, strict=True)],
        }
        first[method] = fits[0][0]
    if not results:
        return []
    best = max(results, key=lambda method: results[method]["accuracy"])
    details = {"labels": len(several[0]), "best": best, "methods": results}
    details |= accuracy(first[best], task.test, len(task.classes)).details
    return [Answer("accuracy", results[best]["accuracy"], spread=results[best]["spread"], details=details)]


def ask_attentive(config: attentive.AttentiveConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    assert isinstance(subject.extractor, EncoderFeatures)
    result = attentive.attentive_probe(
        config, subject.extractor, bench.train, task.train, bench.test, len(task.classes), bench.seed, bench.workers
    )
    about = {"chosen_head": result.chosen, "sweep": result.sweep}
    return [accuracy(result.predictions, task.test, len(task.classes), **about)]


def ask_finetune(config: finetune.FinetuneConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    predictions = finetuned(config, subject, task, bench, np.arange(len(bench.train)))
    return [accuracy(predictions, task.test, len(task.classes))]


def finetuned(config: finetune.FinetuneConfig, subject: Subject, task: Task, bench: Bench, rows: np.ndarray) -> Tensor:
    """What an encoder that learned from some of the labels makes of the test set, int64 [m]."""
    assert subject.encoder
    model = finetune.finetune(
        config, subject.encoder, bench.train, rows, task.train[rows], len(task.classes), bench.view, bench.autocast,
        bench.seed, bench.workers)  # fmt: skip
    images = Images(bench.test, np.arange(len(bench.test)), bench.view)
    return finetune.classify(model, subject.encoder, images, bench.autocast, bench.workers)


def ask_quality(config: quality.QualityConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    last = subject.train.rows(permutation(bench.seed, "quality", 0, len(subject.train))[: config.images])[:, -1]
    rows = permutation(bench.seed, "lidar", 0, len(subject.train))[: config.lidar_images]
    kind: Kind = "squash" if bench.view.squash else "crop"
    views = []
    for epoch in range(config.lidar_views):
        images = Augmented(bench.train, rows, bench.view, kind, bench.seed, epoch)
        loader = DataLoader(images, batch_size=BATCH, num_workers=bench.workers)
        views.append(torch.cat([subject.extractor(batch)[:, -1] for batch in loader]))
    about = {"dimensions": last.shape[1], "images": len(last)}
    return [
        Answer("RankMe", quality.rankme(last), details=about),
        Answer("alpha-ReQ", quality.alpha_req(last), details=about),
        Answer("LiDAR", quality.lidar(torch.stack(views, 1)), details={**about, "images": len(rows)}),
    ]


PROTOCOLS: dict[str, Asked] = {
    "knn": Asked("knn", knn.KnnConfig(), ask_knn),
    "linear": Asked("linear", linear.RECIPES["fast"], ask_linear),
    **{f"linear:{name}": Asked(f"linear:{name}", config, ask_linear) for name, config in linear.RECIPES.items()},
    **{f"lowshot:{name}": Asked(f"lowshot:{name}", config, ask_lowshot) for name, config in lowshot.RECIPES.items()},
    "attentive": Asked("attentive", attentive.AttentiveConfig(), ask_attentive, pixels=False),
    **{
        f"finetune:{name}": Asked(f"finetune:{name}", config, ask_finetune, pixels=False)
        for name, config in finetune.RECIPES.items()
    },
    "quality": Asked("quality", quality.QualityConfig(), ask_quality, labels=False, pixels=False),
}


# ---------------------------------------------------------------- questions and answers


def evaluate(encoders: dict[str, Encoder], bench: Bench, protocols: Sequence[Asked], known: Sequence[dict[str, Any]],
             console: Console) -> list[dict[str, Any]]:  # fmt: skip
    """Ask every protocol about every encoder, and raw pixels, on every task.

    encoders: by the name they get in the results. known: earlier records; what they answer is not asked again. Returns one
    record an answer. Raises UserError for missing labels, or classes that the test set alone has.
    """
    nothing = Task("", [], torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    found = tasks(bench.train, bench.test) if any(protocol.labels for protocol in protocols) else []
    before = {} if bench.fresh else by_question(known)
    records: list[dict[str, Any]] = []
    reused = 0
    for name in [*encoders, "raw pixels"]:
        subject = Subject(name, encoders.get(name), bench, console)
        for protocol in protocols:
            if not subject.encoder and not protocol.pixels:
                continue
            for task in found if protocol.labels else [nothing]:
                question = short_hash(
                    {
                        "version": VERSION,
                        "subject": subject.extractor.identity,
                        "data": bench.fingerprints,
                        "task": task.name,
                        "protocol": protocol.name,
                        "config": asdict(protocol.config),
                        "precision": bench.precision,
                        "seed": bench.seed,
                    }
                )
                if question in before:
                    records += before[question]
                    reused += 1
                    continue
                start = time.perf_counter()
                answers = protocol.run(protocol.config, subject, task, bench)
                about = {
                    "task": task.name,
                    "protocol": protocol.name,
                    "of": name,
                    "image_size": bench.view.size,
                    "images": {"train": len(bench.train), "test": len(bench.test), "shared": subject.shared_images()},
                    "classes": task.classes,
                    "config": asdict(protocol.config),
                    "question": question,
                    "seconds": round(time.perf_counter() - start, 2),
                }
                records += [{**about, **asdict(answer)} for answer in answers]
    if reused:
        console.print(f"{reused} answers were there already (--fresh asks anew)", highlight=False)
    if shared := max(r["images"]["shared"] for r in records):
        console.print(f"warning: {shared} test images are in the training set, too", style="yellow", highlight=False)
    return records


def by_question(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["question"], []).append(record)
    return found


# ---------------------------------------------------------------- the table


def rows(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Subjects, and a row of cells for each task, protocol and metric; a mean for tasks that share a protocol's metric."""
    subjects = list(dict.fromkeys(r["of"] for r in records))
    lines: list[list[str]] = []
    for protocol, metric in dict.fromkeys((r["protocol"], r["metric"]) for r in records):
        mine = [r for r in records if (r["protocol"], r["metric"]) == (protocol, metric)]
        value = {(r["task"], r["of"]): r for r in mine}
        names = list(dict.fromkeys(r["task"] for r in mine))
        unit = f"{metric}, %" if metric in SHARES else metric
        for task in names:
            lines.append([task, protocol, unit, *(cell(value.get((task, s))) for s in subjects)])
        if len(names) > 1:
            means = [[value[t, s]["value"] for t in names if (t, s) in value] for s in subjects]
            lines.append(["mean", protocol, unit, *(shown(sum(m) / len(m), metric) if m else "" for m in means)])
    return subjects, lines


def cell(record: dict[str, Any] | None) -> str:
    """54.9 ± 1.0, or nothing."""
    if record is None:
        return ""
    text = shown(record["value"], record["metric"])
    low, high = record["interval"] or (0, 2 * (record["spread"] or 0))
    return text + (f" ± {shown((high - low) / 2, record['metric'])}" if high > low else "")


def shown(value: float, metric: str) -> str:
    return f"{100 * value:.1f}" if metric in SHARES else f"{value:.3g}"


def table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """Every subject beside its controls, 95 % intervals over the test set."""
    subjects, lines = rows(records)
    out = Table(title=title)
    for heading in ("task", "protocol", "metric"):
        out.add_column(heading)
    for heading in subjects:
        out.add_column(heading, justify="right")
    for line in lines:
        mean = line[0] == "mean"
        out.add_row(*line, style="bold" if mean else None, end_section=mean)
    return out

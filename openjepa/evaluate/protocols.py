"""Every protocol by its name: how a subject is asked about a task, and what its answers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openjepa.data.workers import loaded
from openjepa.errors import UserError
from openjepa.evaluate import attentive, dense, finetune, knn, linear, lowshot, quality
from openjepa.evaluate.features import BATCH, Images
from openjepa.evaluate.scores import Answer, accuracy, depth, segmentation
from openjepa.evaluate.subjects import Bench, Kind, Subject, Task
from openjepa.evaluate.views import Augmented, ViewFeed
from openjepa.rng import permutation

K = 20  # the k of the table; all of them are in the JSON


@dataclass(frozen=True)
class Asked:
    """A protocol with its values.

    run: from a subject, a task and the bench to answers. kind: of the tasks that it is asked about. pixels: whether raw
    pixels can be asked, too. changed: the values that are not those of its name, such as per_class 10.
    """

    name: str
    config: Any
    run: Callable[[Any, Subject, Task, Bench], list[Answer]]
    kind: Kind = "class"
    pixels: bool = True
    changed: str = ""


# ---------------------------------------------------------------- classes


def ask_knn(config: knn.KnnConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    labels, expected = task.labels
    bank, queries = subject.train.last(), subject.test.last()
    ks = [k for k in config.ks if k <= len(bank)]
    if not ks:
        raise UserError(f"k-NN with k {min(config.ks)} needs as many training images: there are {len(bank)}")
    predicted = knn.knn_predict(bank, labels, queries, len(task.classes), ks, config.temperature, bench.device)
    by_k = {str(k): float((p == expected).float().mean()) for k, p in predicted.items()}
    k = K if K in predicted else max(predicted)
    return [accuracy(predicted[k], expected, len(task.classes), k=k, accuracy_by_k=by_k)]


def ask_linear(config: linear.LinearConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    labels, expected = task.labels
    views = None
    if config.views != "none":
        views = partial(
            ViewFeed, subject.extractor, bench.train, kind=config.views, seed=bench.seed, workers=bench.workers
        )
    half = bench.precision == "bf16"
    probe = linear.Probe(config, subject.train, labels, len(task.classes), bench.device, half, bench.seed, views)
    result = probe.run(subject.test)
    sweep = [{**asdict(head), "validation_accuracy": value} for head, value in result.sweep]
    return [accuracy(result.predictions, expected, len(task.classes), chosen_head=asdict(result.chosen), sweep=sweep)]


def ask_attentive(config: attentive.AttentiveConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    result = attentive.attentive_probe(config, *subject.patches(task), len(task.classes))
    _, expected = task.labels
    about = {"chosen_head": result.chosen, "sweep": result.sweep}
    return [accuracy(result.predictions, expected, len(task.classes), **about)]


def ask_lowshot(config: lowshot.LowShotConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    labels, expected = task.labels
    several = lowshot.draws(config, bench.train, labels, bench.seed)
    results: dict[str, dict[str, Any]] = {}
    first: dict[str, Tensor] = {}  # draw's predictions: the confusion is theirs
    for method in config.methods:
        if method == "finetune" and not subject.encoder:
            continue
        if method == "linear":
            fits = [lowshot.logistic(config, subject.train, labels, rows, subject.test) for rows in several]
        else:
            fits = [(finetuned(config.finetune, subject, task, bench, rows), {}) for rows in several]
        shares = [float((predictions == expected).float().mean()) for predictions, _ in fits]
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
    details |= accuracy(first[best], expected, len(task.classes)).details
    return [Answer("accuracy", results[best]["accuracy"], spread=results[best]["spread"], details=details)]


def ask_finetune(config: finetune.FinetuneConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    predictions = finetuned(config, subject, task, bench, np.arange(len(bench.train)))
    return [accuracy(predictions, task.labels[1], len(task.classes))]


def finetuned(config: finetune.FinetuneConfig, subject: Subject, task: Task, bench: Bench, rows: np.ndarray,
              images: Images | None = None, say: Callable[[str], None] = lambda line: None) -> Tensor:  # fmt: skip
    """What an encoder that learned from some of the labels makes of images, the test set unless told. int64 [n]."""
    assert subject.encoder
    labels, _ = task.labels
    model = finetune.finetune(
        config, subject.encoder, bench.train, rows, labels, len(task.classes), bench.view, bench.autocast, bench.seed,
        bench.workers, say)  # fmt: skip
    images = images or Images(bench.test, np.arange(len(bench.test)), bench.view)
    return finetune.classify(model, subject.encoder, images, bench.autocast, bench.workers)


# ---------------------------------------------------------------- maps


def ask_segment_knn(config: dense.SegmentKnnConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    found = dense.segment_knn(config, *subject.patches(task), bench.grid, len(task.classes))
    return [segmentation(found.statistics, task.classes, chosen_head=found.chosen, sweep=found.sweep)]


def ask_segment_linear(config: dense.SegmentConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    found = dense.segment_linear(config, *subject.patches(task), bench.grid, len(task.classes))
    return [segmentation(found.statistics, task.classes, chosen_head=found.chosen, sweep=found.sweep)]


def ask_depth(config: dense.DepthConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    found = dense.depth_linear(config, *subject.patches(task), bench.grid)
    return [depth(found.statistics, chosen_head=found.chosen, sweep=found.sweep)]


# ---------------------------------------------------------------- no answers needed


def ask_quality(config: quality.QualityConfig, subject: Subject, task: Task, bench: Bench) -> list[Answer]:
    some = permutation(bench.seed, "quality", 0, len(subject.train))
    last = subject.train.rows(np.sort(some[: config.images]))[:, -1]
    rows = permutation(bench.seed, "lidar", 0, len(subject.train))[: config.lidar_images]
    views = []
    for epoch in range(config.lidar_views):
        images = Augmented(bench.train, rows, bench.view, "squash" if bench.view.squash else "crop", bench.seed, epoch)
        made = loaded(images, bench.workers, batch_size=BATCH)
        views.append(torch.cat([subject.extractor(batch)[:, -1] for batch in made]))
    about = {"dimensions": last.shape[1], "images": len(last)}
    answers = [
        Answer("RankMe", quality.rankme(last), details=about),
        Answer("alpha-ReQ", quality.alpha_req(last), details=about),
        Answer("LiDAR", quality.lidar(torch.stack(views, 1)), details={**about, "images": len(rows)}),
    ]
    return [answer for answer in answers if math.isfinite(answer.value)]  # features of one direction have no slope


# ---------------------------------------------------------------- by name


def named(kind: str, recipes: dict[str, Any], run: Callable[..., list[Answer]], **more: Any) -> list[Asked]:
    return [Asked(f"{kind}:{name}", config, run, **more) for name, config in recipes.items()]


ALL: Sequence[Asked] = (
    Asked("knn", knn.KnnConfig(), ask_knn),
    Asked("linear", linear.RECIPES["fast"], ask_linear),
    *named("linear", linear.RECIPES, ask_linear),
    Asked("attentive", attentive.AttentiveConfig(), ask_attentive),
    *named("lowshot", lowshot.RECIPES, ask_lowshot),
    *named("finetune", finetune.RECIPES, ask_finetune, pixels=False),
    Asked("segment:knn", dense.SegmentKnnConfig(), ask_segment_knn, "segmentation"),
    Asked("segment:linear", dense.SegmentConfig(), ask_segment_linear, "segmentation"),
    Asked("depth", dense.DepthConfig(), ask_depth, "depth"),
    Asked("quality", quality.QualityConfig(), ask_quality, "none", pixels=False),
)
PROTOCOLS = {asked.name: asked for asked in ALL}

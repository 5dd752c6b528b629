"""`openjepa evaluate`: every protocol asked for, always beside the two controls."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openjepa.data.sources import Source
from openjepa.engine.device import Precision, pick_autocast, pick_device
from openjepa.errors import UserError, nearest
from openjepa.evaluate.features import Images, extract, raw_pixels
from openjepa.evaluate.knn import knn_predict
from openjepa.evaluate.linear import linear_probe
from openjepa.models.encoder import Encoder

PROTOCOLS = ("knn", "linear")
K = 20  # the k of the table; all of them are in the JSON
LAYERS = 4
CONTROLS = ("random weights", "raw pixels")


def evaluate(encoders: dict[str, Encoder], train: Source, test: Source, protocols: Sequence[str], device: str,
             precision: Precision, console: Console) -> list[dict[str, Any]]:  # fmt: skip
    """Score encoders, and raw pixels, on every task that train and test share.

    encoders: by the name they get in the results. Returns one record for each task, protocol and representation.
    Raises UserError for unknown protocols, missing labels or classes that only the test set has.
    """
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            choices = ", ".join(PROTOCOLS)
            raise UserError(f"unknown protocol '{protocol}': one of {choices}{nearest(protocol, PROTOCOLS)}")
    tasks = [task for task in train.labels if task in test.labels and len(train.classes[task]) > 1]
    if not tasks:
        raise UserError(
            "evaluation needs labels in both sets, of two classes or more: sub-folders as classes, or a label column"
        )
    labels = {task: (torch.from_numpy(train.labels[task]), matched_labels(train, test, task)) for task in tasks}
    where = pick_device(device)
    autocast = pick_autocast(precision, where)
    results: list[dict[str, Any]] = []
    for name in [*encoders, "raw pixels"]:
        start = time.perf_counter()
        first = next(iter(encoders.values())).vit.config
        x, y = (Images(s, np.arange(len(s)), first.image_size, first.channels) for s in (train, test))
        if name in encoders:
            encoder = encoders[name].to(where)
            features = [extract(encoder.vit, part, encoder.normalise, autocast, LAYERS) for part in (x, y)]
        else:
            features = [raw_pixels(part) for part in (x, y)]
        console.print(
            f"{name}: features of {len(x) + len(y)} images in {time.perf_counter() - start:.0f} s", highlight=False
        )
        for task in tasks:
            for protocol in protocols:
                start = time.perf_counter()
                record = score(
                    protocol, features[0], labels[task][0], features[1], labels[task][1], len(train.classes[task])
                )
                seconds = round(time.perf_counter() - start, 2)
                results.append({"task": task, "protocol": protocol, "of": name, **record, "seconds": seconds})
    return results


def score(
    protocol: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> dict[str, Any]:
    """One protocol on pooled features [n, layers, D]. Returns a record with `accuracy`."""
    if protocol == "knn":
        predicted = knn_predict(train[:, -1], train_labels, test[:, -1], classes)
        by_k = {k: float((p == test_labels).float().mean()) for k, p in predicted.items()}
        k = K if K in by_k else max(by_k)
        return {"accuracy": by_k[k], "k": k, "accuracy_by_k": by_k}
    result = linear_probe(train, train_labels, test, test_labels, classes)
    sweep = [{**asdict(head), "validation_accuracy": value} for head, value in result.sweep]
    return {"accuracy": result.accuracy, "chosen_head": asdict(result.chosen), "sweep": sweep}


def matched_labels(train: Source, test: Source, task: str) -> Tensor:
    """The test labels in the training set's numbering of classes. int64 [m]."""
    number = {name: i for i, name in enumerate(train.classes[task])}
    missing = [name for name in test.classes[task] if name not in number]
    if missing:
        raise UserError(f"the test set has classes that the training set lacks, such as '{missing[0]}'")
    translate = np.array([number[name] for name in test.classes[task]], dtype=np.int64)
    return torch.from_numpy(translate[test.labels[task]])


def write(run: Path, results: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """evaluation.json in the run's folder."""
    (run / "evaluation.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def table(results: list[dict[str, Any]], name: str) -> Table:
    """Accuracies in percent: the encoder beside its controls, and the mean over tasks."""
    columns = list(dict.fromkeys(r["of"] for r in results))
    out = Table(title=f"accuracy in %, {name}")
    for heading in ("task", "protocol"):
        out.add_column(heading)
    for heading in columns:
        out.add_column(heading, justify="right")
    value = {(r["task"], r["protocol"], r["of"]): 100 * r["accuracy"] for r in results}
    tasks, protocols = (list(dict.fromkeys(r[key] for r in results)) for key in ("task", "protocol"))
    for protocol in protocols:
        for task in tasks:
            out.add_row(task, protocol, *(f"{value[task, protocol, c]:.1f}" for c in columns))
        if len(tasks) > 1:
            means = [sum(value[task, protocol, c] for task in tasks) / len(tasks) for c in columns]
            out.add_row("mean", protocol, *(f"{m:.1f}" for m in means), style="bold", end_section=True)
    return out

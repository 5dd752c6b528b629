"""What predictions are worth: accuracy with an interval, per class, and who is taken for whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openjepa.rng import key

RESAMPLES = 1000
LEVEL = 0.95
SHARES = ("accuracy", "mIoU")  # metrics that are shown in percent


@dataclass(frozen=True)
class Answer:
    """One number. metric: accuracy and mIoU are shares of 1. interval: 95 % over test images, where there is one.

    spread: standard deviation over draws, where there are several.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None = None
    spread: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def accuracy(predictions: Tensor, labels: Tensor, classes: int, **details: Any) -> Answer:
    """Top-1 with its bootstrap interval; details hold the mean over classes, each class's own (None without test images)
    and the confusion as [true, predicted] counts. predictions, labels: int64 [n]."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.view(-1).scatter_add_(0, labels * classes + predictions, torch.ones_like(labels))
    counts = confusion.sum(1)
    per_class = [float(confusion[c, c] / counts[c]) if counts[c] else None for c in range(classes)]
    correct = predictions == labels
    mean = float(np.mean([share for share in per_class if share is not None]))
    about = {"mean_per_class": mean, "per_class": per_class, "confusion": sparse(confusion)}
    return Answer("accuracy", float(correct.float().mean()), bootstrap(correct), details={**details, **about})


def sparse(confusion: Tensor) -> list[list[int]]:
    """[true, predicted, count] of every pair that occurs: a thousand classes have a million that do not."""
    return [[int(i), int(j), int(confusion[i, j])] for i, j in confusion.nonzero()]


def dense(pairs: list[list[int]], classes: int) -> np.ndarray:
    """The confusion matrix again, int64 [true, predicted]."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    for i, j, count in pairs:
        matrix[i, j] = count
    return matrix


def bootstrap(correct: Tensor, seed: int = 0) -> tuple[float, float]:
    """The interval that LEVEL of resampled test sets' accuracies lie in. correct: bool [n].

    A resample of n draws has a binomial number of correct ones, so that its accuracy can be drawn at once.
    """
    n = len(correct)
    share = float(correct.float().mean())
    generator = np.random.default_rng(key(seed, "bootstrap"))
    accuracies = generator.binomial(n, share, RESAMPLES) / n
    low, high = np.quantile(accuracies, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)

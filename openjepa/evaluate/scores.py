"""What predictions are worth: accuracy with an interval, per class, and who is taken for whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openjepa.rng import key

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Scores:
    """Shares between 0 and 1. interval: 95 % by bootstrap over the test set; confusion: [true, predicted] counts."""

    accuracy: float
    interval: tuple[float, float]
    per_class: list[float | None]  # None for a class without test images
    confusion: list[list[int]]

    @property
    def mean_per_class(self) -> float:
        """The mean over classes that the test set has: what Pets, Flowers and others report."""
        return float(np.mean([share for share in self.per_class if share is not None]))


def score(predictions: Tensor, labels: Tensor, classes: int, seed: int = 0) -> Scores:
    """predictions, labels: int64 [n]."""
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.view(-1).scatter_add_(0, labels * classes + predictions, torch.ones_like(labels))
    counts = confusion.sum(1)
    per_class = [float(confusion[c, c] / counts[c]) if counts[c] else None for c in range(classes)]
    correct = predictions == labels
    return Scores(float(correct.float().mean()), bootstrap(correct, seed), per_class, confusion.tolist())


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

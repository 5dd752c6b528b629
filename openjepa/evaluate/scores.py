"""What predictions are worth: accuracy with an interval, per class, and who is taken for whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openjepa.rng import key

RESAMPLES = 1000
LEVEL = 0.95
SHARES = ("accuracy", "mIoU", "image AUROC", "pixel AUROC", "PRO", "first guess")  # metrics that are shown in percent
IGNORED = 255  # the class of pixels that do not count


@dataclass(frozen=True)
class Answer:
    """One number. metric: accuracy and mIoU are shares of 1, RMSE is in the maps' unit.

    interval: 95 % over test images, where there is one. spread: standard deviation over draws, where there are several.
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
    return middle(generator.binomial(n, share, RESAMPLES) / n)


def resampled(images: int, value: Callable[[np.ndarray], float], seed: int = 0) -> tuple[float, float]:
    """The same for any number. value: from how often each image is drawn, int64 [images]."""
    generator = np.random.default_rng(key(seed, "bootstrap"))
    draws = (generator.integers(0, images, images) for _ in range(RESAMPLES))
    return middle(np.array([value(np.bincount(draw, minlength=images)) for draw in draws]))


def middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# ---------------------------------------------------------------- maps


def confusions(predicted: Tensor, maps: Tensor, classes: int) -> Tensor:
    """Of each image, pixels by true and predicted class. predicted, maps: int64 [B, H, W]. Returns int64 [B, C, C]."""
    counted = maps != IGNORED
    image = torch.arange(len(maps), device=maps.device)[:, None, None].expand_as(maps)
    cells = (image * classes + maps) * classes + predicted
    return torch.bincount(cells[counted], minlength=len(maps) * classes**2).view(-1, classes, classes).cpu()


def mean_iou(confusion: Tensor | np.ndarray) -> float:
    """Intersection over union, the mean over classes that occur. confusion: [C, C]."""
    confusion = np.asarray(confusion, dtype=np.float64)
    true = confusion.sum(1)
    union = true + confusion.sum(0) - np.diag(confusion)
    occurs = true > 0
    return float((np.diag(confusion)[occurs] / union[occurs]).mean()) if occurs.any() else float("nan")


def segmentation(found: Tensor, classes: Sequence[str], **details: Any) -> Answer:
    """mIoU over all pixels of the test set. found: int64 [n, C, C], see `confusions`."""
    total = found.sum(0)
    flat = found.flatten(1).numpy().astype(np.float64)
    interval = resampled(len(found), lambda counts: mean_iou((counts @ flat).reshape(total.shape)))
    union = total.sum(1) + total.sum(0) - total.diag()
    per_class = [float(total[c, c] / union[c]) if total[c].sum() else None for c in range(len(classes))]
    about = {"per_class": per_class, "pixel_accuracy": float(total.trace() / total.sum()), "confusion": sparse(total)}
    return Answer("mIoU", mean_iou(total), interval, details={**details, **about})


def depth_errors(predicted: Tensor, maps: Tensor, far: float) -> Tensor:
    """Of each image: root of the mean squared error, mean relative error, share within a factor of 1.25 (δ1).

    predicted, maps: [B, H, W]; pixels of unknown depth, or beyond far, do not count. Returns float64 [B, 3], nan where none
    does.
    """
    rows = []
    for d, t in zip(predicted.double(), maps.double(), strict=True):
        known = (t > 0) & (t <= far)
        d, t = d[known], t[known]
        ratio = torch.maximum(d / t, t / d)
        rows.append(
            torch.stack([(d - t).square().mean().sqrt(), ((d - t).abs() / t).mean(), (ratio < 1.25).double().mean()])
        )
    return torch.stack(rows).cpu()


def depth(errors: Tensor, **details: Any) -> Answer:
    """RMSE, the mean over images, as is usual. errors: see `depth_errors`."""
    errors = errors[torch.isfinite(errors[:, 0])]
    rmse, relative, close = errors.mean(0).tolist()
    own = errors[:, 0].numpy()
    interval = resampled(len(own), lambda counts: float(counts @ own / len(own)))
    return Answer("RMSE", rmse, interval, details={**details, "abs_rel": relative, "delta1": close})

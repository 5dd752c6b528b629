"""Dense probes on frozen patches: segmentation by nearest neighbours and by a linear layer, depth by a linear layer.

k-NN segmentation after CAPI, the linear ones after DINOv3 (Protocols, F.1, F.3, F.4), at the size of the encoder's own view.
B images, N patches on an h x w grid, C classes, maps of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openjepa.errors import UserError
from openjepa.evaluate.knn import nearest
from openjepa.evaluate.linear import split
from openjepa.evaluate.patches import PatchFeed, SweepConfig, outputs, train
from openjepa.evaluate.scores import IGNORED, confusions, depth_errors, mean_iou

Grid = tuple[int, int]
Metric = Literal["cosine", "l2"]


@dataclass(frozen=True)
class DenseResult:
    """statistics: of each test image, [m, C, C] confusions or [m, 3] depth errors; sweep: every setting and its worth on the
    validation images."""

    statistics: Tensor
    chosen: dict[str, Any]
    sweep: list[dict[str, Any]]


# ---------------------------------------------------------------- segmentation by nearest neighbours


@dataclass(frozen=True, kw_only=True)
class SegmentKnnConfig:
    """Every patch takes, pixel by pixel, the commonest label of its nearest patches. bank: how many patches are compared with."""

    ks: tuple[int, ...] = (1, 3, 10, 30)
    metrics: tuple[Metric, ...] = ("cosine", "l2")
    bank: int = 100_000
    validation: float = 0.1

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or not self.metrics or self.bank < 1 or not 0 < self.validation < 1:
            raise UserError("segment: ks and bank are 1 or more, metrics need one, validation is between 0 and 1")


class Bank:
    """Standardised patches [n, D] and the labels of their pixels, uint8 [n, pixels]."""

    def __init__(self, feed: PatchFeed, rows: np.ndarray, grid: Grid) -> None:
        parts, labels = [], []
        for patches, maps in feed.whole(rows):
            tiles = tiled(maps, grid)
            kept = tiles.mode(-1).values != IGNORED  # what is mostly nothing teaches nothing
            parts.append(patches[kept])
            labels.append(tiles[kept].to(torch.uint8))
        features = torch.cat(parts)
        if len(features) == 0:
            raise UserError("segmentation: no labelled patch in the training images")
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)
        self.features, self.tiles = (features - self.mean) / self.std, torch.cat(labels)

    def labels(self, patches: Tensor, metric: Metric, ks: Sequence[int], classes: int) -> dict[int, Tensor]:
        """The pixels of patches [m, D], for each k: int64 [m, pixels]."""
        queries = (patches - self.mean) / self.std
        parts: dict[int, list[Tensor]] = {k: [] for k in ks}
        for part in queries.split(1024):
            _, index = nearest(self.features, part, max(ks), metric)  # [m, k]
            seen = self.tiles[index].long().clamp(max=classes).transpose(1, 2)  # [m, pixels, k]
            for k in ks:
                votes = torch.zeros(*seen.shape[:2], classes + 1, device=seen.device)
                votes.scatter_add_(2, seen[..., :k], torch.ones_like(seen[..., :k], dtype=votes.dtype))
                parts[k].append(votes[..., :classes].argmax(-1))
        return {k: torch.cat(found) for k, found in parts.items()}


def segment_knn(config: SegmentKnnConfig, data: PatchFeed, test: PatchFeed, grid: Grid, classes: int) -> DenseResult:
    """Choose k and metric on held-out training images, then compare the test set with all of the training set, once."""
    fitting, validation = split(len(data), config.validation, data.seed)
    most = max(1, config.bank // (grid[0] * grid[1]))
    bank = Bank(data, fitting[:most], grid)
    ks = [k for k in config.ks if k <= len(bank.features)]
    found: dict[tuple[Metric, int], list[Tensor]] = {(metric, k): [] for metric in config.metrics for k in ks}
    for patches, maps in data.whole(validation):
        for metric in config.metrics:
            for k, labels in bank.labels(patches.flatten(0, 1), metric, ks, classes).items():
                found[metric, k].append(confusions(untiled(labels, grid, maps), maps, classes))
    worth = {setting: mean_iou(torch.cat(parts).sum(0)) for setting, parts in found.items()}
    sweep = [{"metric": metric, "k": k, "validation_mIoU": value} for (metric, k), value in worth.items()]
    metric, k = max(worth, key=lambda setting: worth[setting])
    bank = Bank(data, np.concatenate([fitting, validation])[:most], grid)
    seen = [
        confusions(untiled(bank.labels(p.flatten(0, 1), metric, [k], classes)[k], grid, maps), maps, classes)
        for p, maps in test.whole(np.arange(len(test)))
    ]
    chosen = {"metric": metric, "k": k, "validation_mIoU": worth[metric, k], "bank": len(bank.features)}
    return DenseResult(torch.cat(seen), chosen, sweep)


def tiled(maps: Tensor, grid: Grid) -> Tensor:
    """[B, H, W] to each patch's pixels, [B, N, pixels]."""
    b, height, width = maps.shape
    ph, pw = height // grid[0], width // grid[1]
    return maps.view(b, grid[0], ph, grid[1], pw).transpose(2, 3).reshape(b, grid[0] * grid[1], ph * pw)


def untiled(tiles: Tensor, grid: Grid, maps: Tensor) -> Tensor:
    """[B * N, pixels] back to the shape of maps [B, H, W]."""
    b, height, width = maps.shape
    ph, pw = height // grid[0], width // grid[1]
    return tiles.view(b, grid[0], grid[1], ph, pw).transpose(2, 3).reshape(b, height, width)


# ---------------------------------------------------------------- linear heads


class PatchLinear(nn.Module):
    """Dropout, batch norm over all patches, a linear layer: [B, N, D] to maps [B, outputs, h, w]."""

    def __init__(self, width: int, outputs: int, grid: Grid, dropout: float = 0.0) -> None:
        super().__init__()
        self.grid = grid
        self.drop, self.norm, self.linear = nn.Dropout(dropout), nn.BatchNorm1d(width), nn.Linear(width, outputs)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.norm(self.drop(patches).flatten(0, 1)).view(patches.shape)
        scores: Tensor = self.linear(x).transpose(1, 2).unflatten(2, self.grid)
        return scores


def widened(scores: Tensor, maps: Tensor) -> Tensor:
    """[B, K, h, w] to the pixels of maps, bilinear."""
    return F.interpolate(scores, maps.shape[-2:], mode="bilinear")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(SweepConfig):
    """Cross-entropy at every pixel, scores interpolated (Protocols, F.3), with fewer steps."""

    name: ClassVar[str] = "segment"

    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    decays: tuple[float, ...] = (1e-3,)
    dropout: float = 0.1


def segment_linear(config: SegmentConfig, data: PatchFeed, test: PatchFeed, grid: Grid, classes: int) -> DenseResult:
    def loss(scores: Tensor, maps: Tensor, step: int) -> Tensor:
        losses = F.cross_entropy(widened(scores, maps), maps, ignore_index=IGNORED, reduction="sum")
        return losses / (maps != IGNORED).sum().clamp(min=1)

    def statistics(scores: Tensor, maps: Tensor) -> Tensor:
        return confusions(widened(scores, maps).argmax(1), maps, classes)

    head = partial(PatchLinear, outputs=classes, grid=grid, dropout=config.dropout)
    probe = DenseProbe(head, loss, statistics, "mIoU", lambda found: mean_iou(found.sum(0)), np.argmax)
    return probe.run(config, data, test)


@dataclass(frozen=True, kw_only=True)
class DepthConfig(SweepConfig):
    """Depth as the mean of bins that a linear layer weighs; scale-invariant loss (Protocols, F.4), with fewer steps.

    near, far: of the bins, in the maps' unit; without far, the farthest of the training maps. Farther pixels do not count.
    variance_from: the step at which the loss looks at the variance, too.
    """

    name: ClassVar[str] = "depth"

    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    decays: tuple[float, ...] = (1e-4,)
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float | None = 35.0
    warmup: float = 1 / 3
    bins: int = 256
    near: float = 1e-3
    far: float | None = None
    variance_from: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 2 or self.near <= 0 or (self.far is not None and self.far <= self.near):
            raise UserError("depth: two bins or more, near above 0 and below far")


def depth_linear(config: DepthConfig, data: PatchFeed, test: PatchFeed, grid: Grid) -> DenseResult:
    far = config.far or farthest(maps for _, maps in data.whole(np.arange(len(data))))
    centres = torch.linspace(config.near, far, config.bins, device=data.device)

    def depths(scores: Tensor, maps: Tensor) -> Tensor:
        weights = scores.relu() + 0.1
        return widened((weights * centres[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True), maps)[
            :, 0
        ]

    def loss(scores: Tensor, maps: Tensor, step: int) -> Tensor:
        known = (maps > 0) & (maps <= far)
        if not known.any():
            return scores.sum() * 0
        g = depths(scores, maps)[known].log() - maps[known].log()
        variance = g.var() if step >= config.variance_from and len(g) > 1 else g.new_zeros(())
        return (variance + 0.15 * g.mean().square() + 1e-12).sqrt()

    def statistics(scores: Tensor, maps: Tensor) -> Tensor:
        return depth_errors(depths(scores, maps), maps, far)

    head = partial(PatchLinear, outputs=config.bins, grid=grid)
    probe = DenseProbe(head, loss, statistics, "RMSE", lambda found: float(found.nanmean(0)[0]), np.argmin)
    found = probe.run(config, data, test)
    return replace(found, chosen={**found.chosen, "far": far})


def farthest(maps: Iterable[Tensor]) -> float:
    far = max((float(part.max()) for part in maps), default=0.0)
    if far <= 0:
        raise UserError("depth: the training maps know no depth at all")
    return far


@dataclass(frozen=True)
class DenseProbe:
    """A head, its loss, and what its outputs are worth.

    head: from the width of patches. loss: from scores [B, K, h, w], maps [B, H, W] and the step. statistics: of each image,
    from scores and maps. value: the metric, from all images' statistics; best: the place of the best of several.
    """

    head: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor, int], Tensor]
    statistics: Callable[[Tensor, Tensor], Tensor]
    metric: str
    value: Callable[[Tensor], float]
    best: Callable[[list[float]], Any]

    def run(self, config: SweepConfig, data: PatchFeed, test: PatchFeed) -> DenseResult:
        """Train a head a setting, choose on held-out training images, see the test set once."""
        fitting, validation = split(len(data), config.validation, data.seed)
        heads = train(self.head, config, data, fitting, self.loss)
        values = [self.value(found) for found in self.measured(heads, data, validation)]
        sweep = [
            {"lr": lr, "weight_decay": decay, f"validation_{self.metric}": value}
            for (lr, decay), value in zip(config.settings, values, strict=True)
        ]
        best = int(self.best(values))
        (seen,) = self.measured([heads[best]], test, np.arange(len(test)))
        return DenseResult(seen, sweep[best], sweep)

    def measured(self, heads: Sequence[nn.Module], feed: PatchFeed, rows: np.ndarray) -> list[Tensor]:
        """Every head's statistics of all images."""
        parts: list[list[Tensor]] = [[] for _ in heads]
        for found, maps in outputs(heads, feed, rows):
            for part, scores in zip(parts, found, strict=True):
                part.append(self.statistics(scores, maps))
        return [torch.cat(part) for part in parts]

"""Probes on patch features: small heads learn side by side from one stream, with the frozen encoder in the loop.

Patch features of a whole data set would fill a disk; made as they are asked for, they can come from augmented views, too.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from openjepa.data.sources import Source
from openjepa.data.workers import loaded
from openjepa.errors import UserError
from openjepa.evaluate.features import BATCH, Extractor, Images
from openjepa.evaluate.views import Answered, Augmented, Kind, Mapped, Maps
from openjepa.rng import key, permutation


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """AdamW on every pair of learning rate and weight decay; a cosine after a linear warm-up.

    lrs: for a batch as it is, or for 256 images where per_256. warmup: share of the steps. views: how images are
    augmented. validation: share of the training set that chooses.
    """

    name: ClassVar[str]

    lrs: tuple[float, ...]
    decays: tuple[float, ...]
    betas: tuple[float, float] = (0.9, 0.999)
    per_256: bool = False
    batch_size: int = 16
    epochs: int = 10
    min_steps: int = 1000  # trains for whichever is longer
    warmup: float = 0.05
    clip_norm: float | None = None
    views: Kind = "squash"
    validation: float = 0.1

    def __post_init__(self) -> None:
        if not self.lrs or not self.decays or min(self.lrs) <= 0 or self.batch_size < 1 or self.epochs < 1:
            raise UserError(
                f"{self.name}: lrs and decays need one value at least; lrs, batch_size and epochs are above 0"
            )
        if not 0 < self.validation < 1 or not 0 <= self.warmup < 1:
            raise UserError(f"{self.name}: validation is between 0 and 1, warmup from 0 to below 1")

    @property
    def settings(self) -> list[tuple[float, float]]:
        return list(itertools.product(self.lrs, self.decays))


@dataclass(frozen=True)
class PatchFeed:
    """Patch features of a source's images, [B, N, D], each batch with its answers: int64 [B], or maps [B, H, W]."""

    extractor: Extractor
    source: Source
    answers: Tensor | Maps
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    seed: int = 0
    workers: int = 0

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def width(self) -> int:
        """D."""
        return int(next(self.whole(np.arange(1)))[0].shape[-1])

    def whole(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order."""
        return self.made(Images(self.source, rows, self.extractor.view), BATCH, drop_last=False)

    def augmented(self, rows: np.ndarray, kind: Kind, epoch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches of an epoch in its own order."""
        order = rows[permutation(self.seed, "probe order", epoch, len(rows))]
        views = Augmented(self.source, order, self.extractor.view, kind, self.seed, epoch)
        return self.made(views, size, drop_last=True)

    def made(self, views: Images | Augmented, size: int, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = Answered(views, self.answers) if isinstance(self.answers, Tensor) else Mapped(views, self.answers)
        for images, answers in loaded(pairs, self.workers, batch_size=size, drop_last=drop_last):
            yield self.extractor.patches(images), answers.to(self.device)


def train(make: Callable[[int], nn.Module], config: SweepConfig, feed: PatchFeed, rows: np.ndarray,
          loss: Callable[[Tensor, Tensor, int], Tensor]) -> list[nn.Module]:  # fmt: skip
    """A head for each setting, all from the same weights and on the same batches, in evaluation mode.

    make: from the width of patches to a head. loss: from its output, the answers and the step.
    """
    width = feed.width  # asked for first: a loader draws a number, too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(feed.seed, config.name) >> 1)
        first = make(width)
    heads = [copy.deepcopy(first).to(feed.device) for _ in config.settings]
    size = min(config.batch_size, len(rows))
    scale = size / 256 if config.per_256 else 1
    groups = [
        {"params": [*head.parameters()], "lr": lr * scale, "peak": lr * scale, "weight_decay": decay}
        for head, (lr, decay) in zip(heads, config.settings, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.betas)
    per_epoch = len(rows) // size
    epochs = max(config.epochs, math.ceil(config.min_steps / per_epoch))
    steps, step = epochs * per_epoch, 0
    for epoch in range(epochs):
        for patches, answers in feed.augmented(rows, config.views, epoch, size):
            rise = (step + 1) / max(1, config.warmup * steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(rise, 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.zero_grad()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key(feed.seed, f"probe step {step}") >> 1)  # dropout
                for head in heads:
                    with feed.autocast():
                        out = head(patches)
                    loss(out.float(), answers, step).backward()
                    if config.clip_norm:
                        nn.utils.clip_grad_norm_(head.parameters(), config.clip_norm)
            optimizer.step()
            step += 1
    return [head.eval() for head in heads]


@torch.no_grad()
def outputs(heads: Sequence[nn.Module], feed: PatchFeed, rows: np.ndarray) -> Iterator[tuple[list[Tensor], Tensor]]:
    """What every head says of whole images, and the answers, batch by batch."""
    for patches, answers in feed.whole(rows):
        with feed.autocast():
            found = [head(patches).float() for head in heads]
        yield found, answers

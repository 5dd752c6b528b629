"""What is asked of masks, and what they are: the patches of every image that are seen, and those that are predicted.

B images, N = H*W patches in row-major order, M targets of T patches, C contexts of K patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from openjepa.errors import UserError

Grid = tuple[int, int]
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """What is hidden and what is seen. Scales are shares of the grid's patches; aspects are height / width."""

    strategy: Literal["multiblock", "block", "rasterized", "random"] = "multiblock"
    behaviour: Literal["paper", "released"] = "paper"  # multiblock: unbiased, or bit for bit the published code
    targets: int = 4  # multiblock: target blocks an image
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    contexts: int = 1  # multiblock: context blocks an image
    context_scale: Range = (0.85, 1.0)
    context_aspect: Range = (1.0, 1.0)  # `paper`: relative to the grid's own, so that (1, 1) fits any grid
    min_keep: int = 10  # fewest visible patches; `released` wants more than this, strictly
    context: Literal["even", "packed"] = "even"  # a random subset to a shared count, or all patches of each image
    hidden: float = 0.6  # block and random: share of the grid that is predicted

    def __post_init__(self) -> None:
        for name in ("targets", "contexts", "min_keep"):
            if getattr(self, name) < 1:
                raise UserError(f"masking.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("target_scale", "context_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise UserError(f"masking.{name} is ({low}, {high}): give a range within 0 to 1, the smaller first")
        for name in ("target_aspect", "context_aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"masking.{name} is ({low}, {high}): give a positive range, the smaller first")
        if not 0 < self.hidden < 1:
            raise UserError(f"masking.hidden is {self.hidden}: hide some and leave some, between 0 and 1")
        if self.behaviour == "released" and self.strategy != "multiblock":
            raise UserError(
                f"masking.behaviour 'released' exists for strategy 'multiblock' alone, not '{self.strategy}'"
            )
        if self.behaviour == "released" and self.context == "packed":
            raise UserError(
                "masking.context 'packed' contradicts behaviour 'released', which cuts contexts to one length"
            )


def hidden_count(share: float, patches: int) -> int:
    """Patches that are hidden: those that stay are rounded down, as in MAE's release."""
    return patches - int(patches * (1 - share) + 1e-9)


@dataclass(frozen=True)
class Masks:
    """Patch indices of one batch.

    context: int64 [B, C, K], the visible patches; where `lengths` says so, the rest of a row is padding.
    targets: int64 [B, M, T], the patches to predict, block by block.
    lengths: int64 [B, C], valid entries of each context row, or None when all K are.
    total: valid entries of all rows, known to the host so that no device need be asked.
    """

    context: Tensor
    targets: Tensor
    lengths: Tensor | None = None
    total: int = 0

    def __len__(self) -> int:
        return len(self.context)

    def rows(self, index: slice | np.ndarray) -> Masks:
        """The masks of some of the images (on the host)."""
        if self.lengths is None:
            return Masks(self.context[index], self.targets[index])
        return Masks(self.context[index], self.targets[index], self.lengths[index], int(self.lengths[index].sum()))

    def counts(self) -> dict[str, float]:
        """Mean context tokens of an image, and target tokens over its blocks."""
        b, c, k = self.context.shape
        context = k if self.lengths is None else self.total / (b * c)
        return {"context_tokens": float(context), "target_tokens": float(self.targets.shape[1] * self.targets.shape[2])}

    def to(self, device: torch.device, non_blocking: bool = False) -> Masks:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Masks:
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Masks:
        lengths = None if self.lengths is None else move(self.lengths)
        return Masks(move(self.context), move(self.targets), lengths, self.total)

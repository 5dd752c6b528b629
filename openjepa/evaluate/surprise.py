"""Surprise: the energy of a JEPA, patch by patch.

A block slides over the image's grid. Each time the context encoder sees all that lies outside it, the predictor tells what is
inside, and what the run's own loss makes of the difference from the target encoder's features is the block's energy (section 2
of the paper). A patch's surprise is the mean over the blocks that cover it.
B images, N = rows * columns patches, M blocks of T patches, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openjepa.errors import UserError
from openjepa.masking import Grid, Masks
from openjepa.methods.ijepa import IJEPA
from openjepa.models.encoder import Normalise

TOKENS = 2**14  # patches that are encoded at a time
FEW = 10  # reference images that the spread over all places counts for at each place

Energy = Callable[[Tensor], Tensor]  # uint8 [B, channels, H, W] to float32 [B, rows, columns]


# ---------------------------------------------------------------- blocks


def sliding(grid: Grid, block: Grid, stride: int = 1) -> Tensor:
    """The blocks of one shape that slide over a grid in raster order; the last of each row and column touches the border.

    block: rows and columns. Returns patch indices, int64 [M, T]. Raises UserError for a block that hides nothing or all.
    """
    (rows, columns), (h, w) = grid, block
    if not (1 <= h <= rows and 1 <= w <= columns) or (h, w) == grid:
        raise UserError(
            f"a block of {h}x{w} patches does not fit into a grid of {rows}x{columns} that is to be seen, too"
        )
    if not 1 <= stride <= min(h, w):
        raise UserError(f"a stride of {stride} leaves gaps between blocks of {h}x{w} patches: 1 to {min(h, w)}")
    tops, lefts = ([*range(0, last, stride), last] for last in (rows - h, columns - w))
    inside = (torch.arange(h)[:, None] * columns + torch.arange(w)).flatten()
    return torch.tensor([[top * columns + left] for top in tops for left in lefts]) + inside


def outside(blocks: Tensor, patches: int) -> Tensor:
    """All patches that are not in a block, in order. blocks: int64 [M, T]. Returns int64 [M, patches - T]."""
    seen = torch.ones(len(blocks), patches, dtype=torch.bool).scatter_(1, blocks, False)
    return seen.nonzero()[:, 1].view(len(blocks), -1)


def usual_block(grid: Grid, scale: tuple[float, float]) -> Grid:
    """A square block (on the grid's own aspect) of the middle of a range of scales, as the run was trained on."""
    side = (sum(scale) / 2) ** 0.5
    rows, columns = (max(1, min(n - 1, round(n * side))) if n > 1 else 1 for n in grid)
    return rows, columns


# ---------------------------------------------------------------- energies


class Surprise:
    """A run's energy of every patch: `surprise(images)`, in the run's precision, on the device of its networks."""

    def __init__(self, method: IJEPA, normalise: Normalise, autocast: Callable[[], AbstractContextManager[Any]],
                 block: Grid, stride: int = 1) -> None:  # fmt: skip
        self.method, self.normalise, self.autocast, self.block, self.stride = method, normalise, autocast, block, stride
        self.grid = method.encoder.config.grid
        device = method.encoder.get_buffer("positions").device
        self.blocks = sliding(self.grid, block, stride).to(device)
        self.rest = outside(self.blocks.cpu(), self.grid[0] * self.grid[1]).to(device)

    @property
    def identity(self) -> dict[str, Any]:
        """What its numbers depend on besides weights and images."""
        return {"block": self.block, "stride": self.stride, "arithmetic": type(self.autocast()).__name__}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images of the run's size: uint8, or float in [0, 1], [B, channels, H, W]. Returns [B, rows, columns], on the CPU."""
        (m, t), (rows, columns) = self.blocks.shape, self.grid
        b, device = len(images), self.blocks.device
        total = torch.zeros(b, rows * columns, device=device)
        with self.autocast():
            normalised = self.normalise(images.to(device))
            every = Masks(self.rest.expand(b, -1, -1), self.blocks.expand(b, -1, -1))
            targets = self.method.targets(normalised, every)  # [B, M, T, D]
            pairs = torch.cartesian_prod(torch.arange(b, device=device), torch.arange(m, device=device))
            for i, j in (part.unbind(1) for part in pairs.split(max(1, TOKENS // (rows * columns)))):
                masks = Masks(self.rest[j, None], self.blocks[j, None])
                context, visible, _ = self.method.encode_context(normalised[i], masks, 0)
                predicted = self.method.predictor(context, visible, masks.targets)[:, 0]  # [P, T, D]
                each = (x.float().flatten(0, 1)[:, None, None] for x in (predicted, targets[i, j]))
                energies = self.method.loss(*each).view(-1, t)  # of every patch alone
                total.index_put_((i[:, None], self.blocks[j]), energies, accumulate=True)
        covered = torch.bincount(self.blocks.flatten(), minlength=rows * columns)
        return (total / covered).view(b, rows, columns).cpu()


class Unlike:
    """A control in raw pixels: the mean squared distance of each patch from the mean of the reference images."""

    def __init__(self, batches: Iterable[Tensor], grid: Grid) -> None:
        """batches: the reference images, uint8 [B, channels, H, W]."""
        self.grid = grid
        total, count = torch.zeros(()), 0
        for images in batches:
            total = total + images.float().sum(0)
            count += len(images)
        self.mean = total / count

    def __call__(self, images: Tensor) -> Tensor:
        return pooled(((images.float() - self.mean) / 255).square(), self.grid)


class Contrast:
    """A control in raw pixels: how far each differs from the mean of its surroundings, two patches wide."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        reach = tuple(side // n for side, n in zip(images.shape[-2:], self.grid, strict=True))
        window = [2 * r + 1 for r in reach]
        around = F.avg_pool2d(x, window, 1, reach, count_include_pad=False)
        return pooled((x - around).square(), self.grid)


def pooled(errors: Tensor, grid: Grid) -> Tensor:
    """The mean of a patch's pixels and channels. [B, channels, H, W] to [B, rows, columns]."""
    return F.adaptive_avg_pool2d(errors.mean(1, keepdim=True), grid)[:, 0]


# ---------------------------------------------------------------- statistics and score


@dataclass(frozen=True)
class Statistics:
    """What energies of a reference set are like at each place. centre, spread: float32 [rows, columns]."""

    centre: np.ndarray
    spread: np.ndarray
    images: int

    @classmethod
    def of(cls, maps: np.ndarray) -> Statistics:
        """maps: [n, rows, columns]. Few images tell little of one place: their spread leans on that of all places.

        Raises UserError for fewer than two images.
        """
        n = len(maps)
        if n < 2:
            raise UserError(f"a reference of {n} images says nothing of what is usual: give 2, better 100 or more")
        maps = maps.astype(np.float64)
        centre = maps.mean(0)
        variance = (maps - centre).__pow__(2).sum(0) / (n - 1)
        spread = np.sqrt((n * variance + FEW * variance.mean()) / (n + FEW))
        return cls(centre.astype(np.float32), np.maximum(spread, 1e-12).astype(np.float32), n)

    def __call__(self, maps: np.ndarray) -> np.ndarray:
        """Energies [..., rows, columns] in deviations from what is usual at their place."""
        return (maps - self.centre) / self.spread


def score(normalised: np.ndarray) -> np.ndarray:
    """One number an image. normalised: [n, rows, columns]. Returns float32 [n]."""
    return normalised.reshape(len(normalised), -1).max(1)

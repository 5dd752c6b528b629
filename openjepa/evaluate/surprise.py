"""Surprise: the energy of a JEPA, patch by patch.

A block slides over the image's grid. Each time the context encoder sees all that lies outside it, the predictor tells what is
inside, and what the run's own loss makes of the difference from the target encoder's features is the block's energy (section 2
of the paper). A patch's energy is the mean over the blocks that cover it.

Energies are high wherever something is hard to tell, usual or not. What is unusual shows beside a reference set, in the remains
themselves: by how their directions vary there (a Mahalanobis distance), not by their length. docs/looking.md has both measured.
B images, N = rows * columns patches, M blocks of T patches, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openjepa.errors import UserError
from openjepa.masking import Grid, Masks
from openjepa.methods.ijepa import IJEPA
from openjepa.models.encoder import Normalise
from openjepa.models.layers import patchify

TOKENS = 2**14  # patches that are encoded at a time
RIDGE = 1e-3  # share of the mean variance that is added to every direction's
KEPT = 64  # reference images whose own scores are kept

Remains = Callable[
    [Tensor], Tensor
]  # uint8 [B, channels, H, W] to what is left of each patch, float32 [B, N, D] on the CPU


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
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images of the run's size: uint8, or float in [0, 1], [B, channels, H, W].

        Returns energies [B, rows, columns] and remains [B, N, D], target less prediction, both the mean over blocks, on the CPU.
        """
        (m, t), n = self.blocks.shape, self.grid[0] * self.grid[1]
        b, device = len(images), self.blocks.device
        with self.autocast():
            normalised = self.normalise(images.to(device))
            every = Masks(self.rest.expand(b, -1, -1), self.blocks.expand(b, -1, -1))
            targets = self.method.targets(normalised, every)  # [B, M, T, D]
            energies, remains = torch.zeros(b, n, device=device), torch.zeros(b, n, targets.shape[-1], device=device)
            pairs = torch.cartesian_prod(torch.arange(b, device=device), torch.arange(m, device=device))
            for i, j in (part.unbind(1) for part in pairs.split(max(1, TOKENS // n))):
                masks = Masks(self.rest[j, None], self.blocks[j, None])
                context, visible, _ = self.method.encode_context(normalised[i], masks, 0)
                predicted = self.method.predictor(context, visible, masks.targets)[:, 0].float()  # [P, T, D]
                target = targets[i, j].float()
                each = (x.flatten(0, 1)[:, None, None] for x in (predicted, target))  # every patch a block of its own
                where = (i[:, None], self.blocks[j])
                energies.index_put_(where, self.method.loss(*each).view(-1, t), accumulate=True)
                remains.index_put_(where, target - predicted, accumulate=True)
        covered = torch.bincount(self.blocks.flatten(), minlength=n)
        return (energies / covered).view(b, *self.grid).cpu(), (remains / covered[:, None]).cpu()

    def energies(self, images: Tensor) -> Tensor:
        return self(images)[0]

    def remains(self, images: Tensor) -> Tensor:
        return self(images)[1]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """A control: what the target encoder makes of each patch, nothing predicted."""
        with self.autocast():
            found = self.method.target_encoder(self.normalise(images.to(self.blocks.device)))
            return self.method.loss.levelled(found).cpu()


def pixels(images: Tensor, patch: int) -> Tensor:
    """A control: the patches themselves."""
    return patchify(images.float() / 255, patch)


# ---------------------------------------------------------------- what is usual


@dataclass(frozen=True)
class Usual:
    """What remains of the patches of a reference set. mean: [N, D], at each place; whitening: [D, D], of all places together.

    scores: of some of the reference images, each judged by the others as a new image is by all, in rising order.
    """

    mean: Tensor
    whitening: Tensor
    scores: np.ndarray
    images: int

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Usual:
        """parts: remains of the reference images, [B, N, D] each. Raises UserError for fewer than three images."""
        kept: list[Tensor] = []
        first, second, count = torch.zeros(()), torch.zeros(()), 0
        for part in parts:
            if count < KEPT:
                kept.append(part[: KEPT - count])
            exact = part.double()
            first, second = first + exact.sum(0), second + torch.einsum("bnd,bne->de", exact, exact)
            count += len(part)
        if count < 3:
            raise UserError(f"a reference of {count} images does not say what is usual: give 3, better 100 or more")
        found, scores = cls.from_sums(first, second, count), []
        for one in torch.cat(kept):
            exact = one.double()
            others = cls.from_sums(first - exact, second - exact.T @ exact, count - 1)
            scores.append(score(others(one[None]))[0])
        return replace(found, scores=np.sort(np.array(scores)))

    @classmethod
    def from_sums(cls, first: Tensor, second: Tensor, count: int) -> Usual:
        """first: [N, D], the sum over images; second: [D, D], that of products over images and places."""
        mean = first / count
        covariance = (second - count * mean.T @ mean) / ((count - 1) * len(mean))
        d = len(covariance)
        lifted = covariance + (RIDGE * covariance.trace() / d + 1e-12) * torch.eye(d, dtype=covariance.dtype)
        whitening = torch.linalg.inv(torch.linalg.cholesky(lifted)).T
        return cls(mean.float(), whitening.float(), np.empty(0), count)

    def __call__(self, remains: Tensor) -> np.ndarray:
        """[B, N, D] to how unusual each patch is, float32 [B, N]: 1 on average over the reference."""
        return ((remains - self.mean) @ self.whitening).square().mean(-1).numpy()


def score(unusual: np.ndarray) -> np.ndarray:
    """One number an image, its most unusual patch's: means over several found less. unusual: [n, ...]. Returns [n]."""
    return unusual.reshape(len(unusual), -1).max(1)

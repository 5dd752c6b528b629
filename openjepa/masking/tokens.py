"""Hidden tokens, which stay visible to a network as one learned vector (iBOT, appendix; BEiT).

B images of G crops, N = H*W patches a crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from openjepa.errors import UserError
from openjepa.masking.masks import Grid, Range
from openjepa.rng import Draws

BLOCKS, TRIES = 32, 10  # most rectangles of a crop, and draws of each
TOKEN_ASPECT = (0.3, 1 / 0.3)  # height / width


@dataclass(frozen=True, kw_only=True)
class TokenMaskingConfig:
    """Which patches of an image's crops a learned vector stands in for, while the others stay visible (iBOT; BEiT)."""

    shape: Literal["block", "random"] = "block"
    masked: float = 0.5  # share of the crops that are masked at all; none for DINO
    hidden: Range = (0.1, 0.5)  # of those, the share of the patches that is hidden

    def __post_init__(self) -> None:
        low, high = self.hidden
        if not 0 < low <= high < 1:
            raise UserError(f"token_masking.hidden is ({low}, {high}): hide some and leave some, the smaller first")
        if not 0 <= self.masked <= 1:
            raise UserError(f"token_masking.masked is {self.masked}: a share is between 0 and 1")


@dataclass(frozen=True)
class TokenMasks:
    """hidden: bool [B, G, N], of every image's crops the patches that are hidden.

    total: how many, known to the host so that no device need be asked.
    """

    hidden: Tensor
    total: int

    def __len__(self) -> int:
        return len(self.hidden)

    def rows(self, index: slice | np.ndarray) -> TokenMasks:
        """The masks of some of the images (on the host)."""
        return TokenMasks(self.hidden[index], int(self.hidden[index].sum()))

    def to(self, device: torch.device, non_blocking: bool = False) -> TokenMasks:
        return TokenMasks(self.hidden.to(device, non_blocking=non_blocking), self.total)

    def pin_memory(self) -> TokenMasks:
        return TokenMasks(self.hidden.pin_memory(), self.total)

    def counts(self) -> dict[str, float]:
        """Mean hidden tokens of an image, over its crops."""
        return {"hidden_tokens": self.total / len(self)}


def hide_tokens(config: TokenMaskingConfig, grid: Grid, crops: int, seed: int, step: int, slots: np.ndarray,
                share: np.ndarray) -> TokenMasks:  # fmt: skip
    """Hidden patches of every image's crops, for a share of a step's slots (iBOT, appendix): a function of seed and slot alone."""
    slots = slots[share]
    height, width = grid
    hidden = np.zeros((len(slots) * crops, height, width), dtype=bool)
    draws = Draws(seed, "token masks", (slots[:, None] * crops + np.arange(crops)).ravel())
    whether, much = draws.uniform(2).T
    much = config.hidden[0] + much * (config.hidden[1] - config.hidden[0])
    wanted = np.where(whether < config.masked, (much * height * width).astype(int), 0)
    if config.shape == "random":
        rank = draws.uniform(height * width).argsort(-1).argsort(-1)
        hidden = (rank < wanted[:, None]).reshape(hidden.shape)
    else:
        for i in np.flatnonzero(wanted):
            numbers = draws.take(np.array([i])).uniform(BLOCKS, TRIES, 4)[0]
            rectangles(hidden[i], int(wanted[i]), numbers)
    patches = hidden.reshape(len(slots), crops, -1)
    return TokenMasks(torch.from_numpy(patches), int(patches.sum()))


def rectangles(mask: np.ndarray, count: int, u: np.ndarray) -> None:
    """Hide rectangles until `count` patches are hidden, or none of ten draws fits any more. u: [BLOCKS, TRIES, 4] uniforms."""
    height, width = mask.shape
    smallest = (min(height, width) // 3) ** 2
    low, high = np.log(TOKEN_ASPECT)
    left = count
    for tries in u:
        for area, aspect, y, x in tries:
            area = smallest + area * (left - smallest)
            ratio = math.exp(low + aspect * (high - low))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < h < height and 0 < w < width):
                continue
            top, side = int(y * (height - h + 1)), int(x * (width - w + 1))
            block = mask[top : top + h, side : side + w]
            if 0 < (new := block.size - int(block.sum())) <= left:
                block[:] = True
                left -= new
                break
        else:
            return
        if left <= 0:
            return

"""Where a block lies, and the pixels of it: cut out to a square, and put back.

B images, C channels, S pixels a side of a square; boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openjepa.errors import UserError
from openjepa.masking import Grid, Masks, block_indices

Rectangle = tuple[int, int, int, int]


def block_boxes(blocks: Tensor, grid: Grid, patch: int) -> Tensor:
    """The box of each block in pixels, where its patches are. blocks: int64 [B, T]. Returns float32 [B, 4]."""
    rows, columns = blocks // grid[1], blocks % grid[1]
    corners = (columns.amin(1), rows.amin(1), columns.amax(1) + 1, rows.amax(1) + 1)
    return torch.stack(corners, 1).float() * patch


def cut(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Boxes of images [B, C, H, W], resized to squares [B, C, S, S] as torch resizes crops: bilinear, antialiased.

    A crop's resize is a matrix for each axis, so that boxes of different sizes, which only the device knows, take one product.
    """
    height, width = images.shape[-2:]
    rows = resize_weights(boxes[:, 1], boxes[:, 3], size, height)
    columns = resize_weights(boxes[:, 0], boxes[:, 2], size, width)
    return torch.einsum("bsh,bchw,btw->bcst", rows, images, columns)


def resize_weights(low: Tensor, high: Tensor, size: int, side: int) -> Tensor:
    """What each of `side` pixels gives to each of `size` between low and high, [B, size, side]. low, high: whole, [B]."""
    scale = ((high - low) / size)[:, None, None]
    place = low[:, None, None] + (torch.arange(size, device=low.device)[:, None] + 0.5) * scale
    pixel = torch.arange(side, device=low.device) + 0.5
    weights = (1 - (pixel - place).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > low[:, None, None]) & (pixel < high[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def paste(images: Tensor, squares: Tensor, boxes: list[Rectangle]) -> Tensor:
    """Images [B, C, H, W], of 0 to 1 or uint8, with squares [B, C, S, S] of 0 to 1, resized, in their boxes; all else as it was."""
    result = images.clone()
    for image, square, (left, top, right, bottom) in zip(result, squares, boxes, strict=True):
        painted = F.interpolate(square[None], (bottom - top, right - left), mode="bilinear", antialias=True)[0]
        if not images.is_floating_point():
            painted = (255 * painted).round().clamp(0, 255)
        image[:, top:bottom, left:right] = painted.to(images.dtype)
    return result


# ---------------------------------------------------------------- in an image as it came


@dataclass(frozen=True)
class Place:
    """A block of an encoder's grid, laid on an image of any size.

    window: what the encoder sees of the image, of the encoder's aspect. rows, columns: first and end of the block's patches.
    """

    window: tuple[float, float, float, float]
    grid: Grid
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def share(self) -> float:
        """Of the grid's patches that the block covers."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0]) / (self.grid[0] * self.grid[1])

    @property
    def box(self) -> Rectangle:
        """The block in pixels of the image, to the nearest whole ones."""
        left, top, right, bottom = self.window
        x, y = (right - left) / self.grid[1], (bottom - top) / self.grid[0]
        return (
            round(left + self.columns[0] * x), round(top + self.rows[0] * y),
            round(left + self.columns[1] * x), round(top + self.rows[1] * y),
        )  # fmt: skip

    @property
    def block(self) -> np.ndarray:
        """The indices of its patches, in raster order."""
        shape = (self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])
        return block_indices(np.array([self.rows[0], self.columns[0]]), shape, self.grid)

    def masks(self) -> Masks:
        """The block to be predicted from all other patches, of a batch of one."""
        others = np.setdiff1d(np.arange(self.grid[0] * self.grid[1]), self.block)
        return Masks(torch.from_numpy(others)[None, None], torch.from_numpy(self.block)[None, None])


def snapped(box: Rectangle, size: tuple[int, int], grid: Grid, patch: int) -> Place:
    """The smallest block of patches that covers a box. box: x, y, width, height; size: width, height, in the image's pixels.

    The encoder sees the largest part of the image that has its own aspect: the middle, moved to hold the box. Raises UserError
    for an empty box, one that is outside, or one that leaves nothing to be seen.
    """
    x, y, w, h = box
    width, height = size
    if min(size) < patch:
        raise UserError(f"an image of {width}x{height} pixels is smaller than a patch ({patch}): give a larger one")
    if w < 1 or h < 1:
        raise UserError(f"--box {x},{y},{w},{h} is empty: give x,y,width,height in pixels, the last two 1 or more")
    if x < 0 or y < 0 or x + w > width or y + h > height:
        raise UserError(f"--box {x},{y},{w},{h} reaches outside the image of {width}x{height} pixels")
    scale = min(width / grid[1], height / grid[0])  # pixels of the image a patch takes
    seen = (grid[1] * scale, grid[0] * scale)
    if w > seen[0] + 1e-6 or h > seen[1] + 1e-6:
        raise UserError(
            f"--box {x},{y},{w},{h} is larger than what the encoder sees of an image of {width}x{height}, "
            f"{int(seen[0])}x{int(seen[1])} pixels: take a smaller box, or crop the image"
        )
    left, top = (
        min(max((whole - part) / 2, low + span - part, 0.0), low, whole - part)
        for whole, part, low, span in ((width, seen[0], x, w), (height, seen[1], y, h))
    )
    columns, rows = (
        (
            max(0, math.floor((low - start) / scale + 1e-6)),
            min(most, math.ceil((low + span - start) / scale - 1e-6)),
        )
        for low, span, start, most in ((x, w, left, grid[1]), (y, h, top, grid[0]))
    )
    place = Place((left, top, left + seen[0], top + seen[1]), grid, rows, columns)
    if place.share == 1:
        raise UserError(f"--box {x},{y},{w},{h} covers all that the encoder sees: leave some of it visible")
    return place

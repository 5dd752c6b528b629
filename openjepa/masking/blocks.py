"""Rectangles of whole patches: which sizes there are, where they may lie, and what they cover."""

from __future__ import annotations

import math

import numpy as np

from openjepa.errors import UserError
from openjepa.masking.masks import Grid, MaskingConfig, Range
from openjepa.rng import Draws


def block_shapes(grid: Grid, scale: Range, aspect: Range, what: str) -> list[Grid]:
    """All whole blocks whose area lies in `scale` and whose aspect lies in `aspect` up to rounding one side.

    Raises UserError, with the arithmetic, when there is none.
    """
    height, width = grid
    low, high = (s * height * width for s in scale)
    shapes = [
        (h, w)
        for h in range(1, height + 1)
        for w in range(max(1, math.ceil(low / h - 1e-9)), min(width, math.floor(high / h + 1e-9)) + 1)
        if (h - 0.5) / (w + 0.5) <= aspect[1] and (h + 0.5) / (w - 0.5) >= aspect[0]
    ]
    if not shapes:
        raise UserError(
            f"masking.{what} {scale[0]:g} to {scale[1]:g} of a {height}x{width} grid asks for blocks of {low:.1f} to "
            f"{high:.1f} patches with height / width {aspect[0]:.2f} to {aspect[1]:.2f}, and no whole block is such: "
            f"{'change' if what == 'hidden' else 'widen'} masking.{what} or use smaller patches"
        )
    return shapes


def draw_shape(grid: Grid, scale: Range, aspect: Range, what: str, sizes: Draws) -> Grid:
    """Draw area and aspect independently and uniformly, and take the nearest whole block."""
    shapes = block_shapes(grid, scale, aspect, what)
    u, v, tie = sizes.uniform(3)[0]
    area = (scale[0] + u * (scale[1] - scale[0])) * grid[0] * grid[1]
    ratio = aspect[0] + v * (aspect[1] - aspect[0])
    h, w = np.array(shapes, dtype=float).T
    distance = np.log(h * w / area) ** 2 + np.log(h / w / ratio) ** 2
    nearest = np.flatnonzero(distance <= distance.min() + 1e-9)  # 13x14 and 14x13 are equally near to a square
    return shapes[nearest[int(tie * len(nearest))]]


def batch_shapes(config: MaskingConfig, grid: Grid, sizes: Draws) -> tuple[Grid, Grid]:
    """The target size and the context size that a whole batch shares."""
    target = draw_shape(grid, config.target_scale, config.target_aspect, "target_scale", sizes)
    context = draw_shape(grid, config.context_scale, relative(config.context_aspect, grid), "context_scale", sizes)
    return target, context


def relative(aspect: Range, grid: Grid) -> Range:
    """A context's aspect range on this grid: (1, 1) is the shape of the grid itself."""
    return aspect[0] * grid[0] / grid[1], aspect[1] * grid[0] / grid[1]


def about(share: float) -> Range:
    """A single share as a range that whole blocks can meet: within a tenth of it."""
    return 0.9 * share, min(1.0, 1.1 * share)


def place(positions: Draws, count: int, grid: Grid, shape: Grid) -> np.ndarray:
    """Top-left corners, uniform over all places where a block fits. Returns int64 [B, count, 2]."""
    room = np.array([grid[0] - shape[0] + 1, grid[1] - shape[1] + 1])
    return positions.integers(room, count, 2)


def block_map(corners: np.ndarray, shape: Grid, grid: Grid) -> np.ndarray:
    """The patches that blocks cover. corners [..., 2]; returns bool [..., H, W]."""
    row = np.arange(grid[0]) - corners[..., :1]
    column = np.arange(grid[1]) - corners[..., 1:]
    inside_rows = (row >= 0) & (row < shape[0])
    inside_columns = (column >= 0) & (column < shape[1])
    return inside_rows[..., :, None] & inside_columns[..., None, :]


def block_indices(corners: np.ndarray, shape: Grid, grid: Grid) -> np.ndarray:
    """The patch indices that blocks cover, in raster order. corners [..., 2]; returns int64 [..., h*w]."""
    offsets = (np.arange(shape[0])[:, None] * grid[1] + np.arange(shape[1])).ravel()
    return corners[..., :1] * grid[1] + corners[..., 1:] + offsets


def visible_patches(corners: np.ndarray, shape: Grid, windows: np.ndarray, window: Grid, grid: Grid) -> np.ndarray:
    """Patches inside each context block and outside all target blocks. Returns bool [B, C, N]."""
    hidden = block_map(corners, shape, grid).any(1, keepdims=True)
    seen = block_map(windows, window, grid) & ~hidden
    return seen.reshape(*seen.shape[:2], -1)

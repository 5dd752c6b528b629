"""Multi-block masking bit for bit as published, with its quirks (docs/masking.md); for replication alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openjepa.errors import UserError
from openjepa.masking.masks import Grid, MaskingConfig, Masks, Range

PATIENCE = 20  # draws of a context before it may overlap one target more


def released(
    config: MaskingConfig, grid: Grid, sizes: torch.Generator, positions: torch.Generator, batch: int
) -> Masks:
    """Multi-block masking bit for bit as published, with its quirks (docs/masking.md); for replication alone.

    One number sets both size and aspect; the last row and column are never reached; contexts lose their last
    patches in raster order down to the shortest of the batch. Draws follow the published order, image by image.
    """
    height, width = grid
    target = released_size(grid, config.target_scale, config.target_aspect, torch.rand(1, generator=sizes).item())
    context = released_size(grid, config.context_scale, config.context_aspect, torch.rand(1, generator=sizes).item())

    def rectangle(h: int, w: int) -> Tensor:
        top = torch.randint(0, height - h, (1,), generator=positions)
        left = torch.randint(0, width - w, (1,), generator=positions)
        mask = torch.zeros(grid, dtype=torch.bool)
        mask[top : top + h, left : left + w] = True
        return mask

    contexts: list[list[Tensor]] = []
    targets: list[list[Tensor]] = []
    for _ in range(batch):
        blocks = [rectangle(*target) for _ in range(config.targets)]
        rows = []
        for _ in range(config.contexts):
            tries, excluded = 0, len(blocks)
            while True:
                mask = rectangle(*context)
                for hidden in blocks[:excluded]:
                    mask &= ~hidden
                if mask.sum() > config.min_keep:
                    break
                tries += 1
                excluded = max(0, excluded - (tries % PATIENCE == 0))
            rows.append(mask.flatten().nonzero()[:, 0])
        contexts.append(rows)
        targets.append([b.flatten().nonzero()[:, 0] for b in blocks])
    shortest = min(len(row) for rows in contexts for row in rows)
    return Masks(
        torch.stack([torch.stack([row[:shortest] for row in rows]) for rows in contexts]),
        torch.stack([torch.stack(rows) for rows in targets]),
    )


def released_size(grid: Grid, scale: Range, aspect: Range, u: float) -> Grid:
    """The published rule: the same uniform number sets area and aspect; no side as long as the grid's."""
    area = int(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    return min(round(math.sqrt(area * ratio)), grid[0] - 1), min(round(math.sqrt(area / ratio)), grid[1] - 1)


def check_released(config: MaskingConfig, grid: Grid, name: str) -> None:
    """The published sampler loops forever when no block has more than `min_keep` patches: not here."""
    if min(grid) < 2:
        raise UserError(f"masking.behaviour 'released' never covers a whole side, so {name} is too small")
    for what, scale, aspect in (
        ("target", config.target_scale, config.target_aspect),
        ("context", config.context_scale, config.context_aspect),
    ):
        h, w = min((released_size(grid, scale, aspect, u / 1000) for u in range(1001)), key=lambda s: s[0] * s[1])
        if h * w <= config.min_keep:
            raise UserError(
                f"masking: on {name} the smallest {what} block is {h}x{w} = {h * w} patches, and 'released' wants more "
                f"than masking.min_keep = {config.min_keep}: lower min_keep or raise {what}_scale"
            )

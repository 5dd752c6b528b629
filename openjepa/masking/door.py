"""Settings that a grid cannot meet are refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from openjepa.errors import UserError
from openjepa.masking.blocks import about, batch_shapes, block_shapes, place, relative, visible_patches
from openjepa.masking.masks import Grid, MaskingConfig, hidden_count
from openjepa.masking.replication import check_released
from openjepa.masking.tokens import TokenMaskingConfig, hide_tokens
from openjepa.rng import Draws

MOST_CELLS = 2**22  # patches of the grid, times blocks, of one image: what its masks take while they are made


@lru_cache(maxsize=64)
def check(config: MaskingConfig, grid: Grid) -> None:
    """Refuse settings that the grid cannot meet, with the arithmetic, before anything runs.

    Raises UserError. What passes here can always be sampled, in bounded time.
    """
    patches = grid[0] * grid[1]
    name = f"a {grid[0]}x{grid[1]} grid ({patches} patches)"
    if patches * (config.targets + config.contexts) > MOST_CELLS:
        raise UserError(
            f"masking: {config.targets} targets and {config.contexts} contexts on {name} are more than {MOST_CELLS} patches "
            "an image: use fewer, or larger patches"
        )
    match config.strategy:
        case "multiblock" if config.behaviour == "released":
            check_released(config, grid, name)
        case "multiblock":
            target = max(
                h * w for h, w in block_shapes(grid, config.target_scale, config.target_aspect, "target_scale")
            )
            shapes = block_shapes(grid, config.context_scale, relative(config.context_aspect, grid), "context_scale")
            context = min(h * w for h, w in shapes)
            if context - target < config.min_keep:
                raise UserError(
                    f"masking: on {name} a context of {context} patches less a target of {target} keeps "
                    f"{context - target}, and masking.min_keep asks for {config.min_keep}: lower min_keep or target_scale"
                )
            kept = expected_context(config, grid)
            if (short := (kept < config.min_keep).mean()) > 0.05:
                raise UserError(
                    f"masking: on {name} {config.targets} targets of up to {target} patches leave {kept.mean():.1f} visible "
                    f"on average, and fewer than masking.min_keep = {config.min_keep} in {short:.0%} of the images: "
                    "use fewer or smaller targets, or lower min_keep"
                )
        case "block":
            shapes = block_shapes(grid, about(config.hidden), config.target_aspect, "hidden")
            kept_fewest = patches - max(h * w for h, w in shapes)
            if kept_fewest < config.min_keep:
                raise UserError(
                    f"masking.hidden {config.hidden} of {name} leaves {kept_fewest}, below min_keep {config.min_keep}"
                )
        case "rasterized":
            if patches // 4 < config.min_keep:
                raise UserError(
                    f"masking: a quadrant of {name} has {patches // 4}, and masking.min_keep asks for {config.min_keep}"
                )
            if grid[0] % 2 or grid[1] % 2:
                raise UserError(
                    f"masking.strategy 'rasterized' splits the grid into equal quadrants: {name} has an odd side"
                )
        case "random":
            hidden = hidden_count(config.hidden, patches)
            if not 0 < hidden <= patches - config.min_keep:
                raise UserError(
                    f"masking.hidden {config.hidden} hides {hidden} of {name}: hide some and leave {config.min_keep} "
                    "(masking.min_keep)"
                )


@lru_cache(maxsize=64)
def check_tokens(config: TokenMaskingConfig, grid: Grid, crops: int = 100) -> None:
    """Refuse hidden tokens that a grid cannot meet: shares of no patch, or smaller than any rectangle. Raises UserError."""
    name = f"a {grid[0]}x{grid[1]} grid"
    if config.shape == "block" and min(grid) < 2:
        raise UserError(f"token_masking.shape block: no rectangle is smaller than {name}: use random")
    if not int(config.hidden[0] * grid[0] * grid[1]):
        raise UserError(
            f"token_masking.hidden {config.hidden[0]:g} of {name} hides no patch: raise it, or set ibot.patch_weight 0"
        )
    slots = np.arange(crops)
    hidden = hide_tokens(replace(config, masked=1.0), grid, 1, 0, 0, slots, slots).hidden
    if (none := float((~hidden.any(-1)).float().mean())) > 0.05:
        raise UserError(
            f"token_masking.hidden {config.hidden[0]:g} to {config.hidden[1]:g} of {name}: no rectangle fits in {none:.0%} of the "
            "crops: raise it, or use token_masking.shape random"
        )


def expected_context(config: MaskingConfig, grid: Grid, images: int = 1000) -> np.ndarray:
    """Visible patches of `images` sampled images, before any redraw (paper behaviour). Returns int64 [images]."""
    counts = []
    for step, slots in enumerate(np.arange(images).reshape(10, -1)):
        positions = Draws(0, "door positions", slots)
        shape, window = batch_shapes(config, grid, Draws(0, "door sizes", [step]))
        corners = place(positions, config.targets, grid, shape)
        windows = place(positions, config.contexts, grid, window)
        counts.append(visible_patches(corners, shape, windows, window, grid).sum(-1).min(-1))
    return np.concatenate(counts)

"""Multi-block masking and the paper's ablations of it (I-JEPA, section 3 and table 6).

Samplers are pure functions of the grid and of counter-based draws.
B images, N = H*W patches in row-major order, M targets of T patches, C contexts of K patches.
"""

from __future__ import annotations

import numpy as np
import torch

from openjepa.masking.blocks import about, batch_shapes, block_indices, block_map, draw_shape, place, visible_patches
from openjepa.masking.door import check
from openjepa.masking.masks import Grid, MaskingConfig, Masks, hidden_count
from openjepa.masking.replication import released
from openjepa.rng import Draws, key

ATTEMPTS = 20  # redraws of one image's blocks when its context would be too small


def sample(config: MaskingConfig, grid: Grid, seed: int, step: int, slots: np.ndarray) -> Masks:
    """The masks of one global batch, a function of (config, grid, seed, step, slots) alone.

    Block sizes come from (seed, step); the positions of each image from (seed, its slot). Give the slots
    of the whole global batch and take a rank's rows afterwards: the evened count is shared by all ranks.
    """
    sizes = Draws(seed, "mask sizes", [step])
    positions = Draws(seed, "mask positions", slots)
    subset = Draws(seed, "mask subset", slots)
    match config.strategy:
        case "multiblock" if config.behaviour == "released":
            check(config, grid)  # it would look for ever for what is not there
            generator = torch.Generator().manual_seed((key(seed, "released positions") + step) % 2**63)
            return released(config, grid, torch.Generator().manual_seed(step), generator, len(slots))
        case "multiblock":
            context, targets = multiblock(config, grid, sizes, positions)
        case "block":
            context, targets = block(config, grid, sizes, positions)
        case "rasterized":
            context, targets = rasterized(grid, positions)
        case "random":
            context, targets = random(config, grid, positions)
    gather = even if config.context == "even" else packed
    return gather(context, targets, subset)


def sample_share(
    config: MaskingConfig, grid: Grid, seed: int, step: int, slots: np.ndarray, share: np.ndarray
) -> Masks:
    """The masks of a share of a step's slots, as `sample` makes them for all."""
    return sample(config, grid, seed, step, slots).rows(share)


def multiblock(config: MaskingConfig, grid: Grid, sizes: Draws, positions: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Several target blocks, and one large context block (or more) without them (paper, section 3).

    All targets of a batch share one size, all contexts another. An image whose context would keep fewer than
    `min_keep` patches draws its blocks anew, at most ATTEMPTS times; the last time all its targets fall together
    on the first, which `check` has shown to leave enough. Returns visible [B, C, N] bool, targets [B, M, T] int64.
    """
    shape, window = batch_shapes(config, grid, sizes)
    corners = place(positions, config.targets, grid, shape)  # [B, M, 2]
    windows = place(positions, config.contexts, grid, window)  # [B, C, 2]
    visible = visible_patches(corners, shape, windows, window, grid)  # [B, C, N]
    short = np.arange(len(positions))
    for attempt in range(1, ATTEMPTS + 1):
        failed = visible[short].sum(-1).min(-1) < config.min_keep
        if not failed.any():
            break
        short, positions = short[failed], positions.take(failed)
        corners[short] = place(positions, config.targets, grid, shape)
        windows[short] = place(positions, config.contexts, grid, window)
        if attempt == ATTEMPTS:
            corners[short] = corners[short, :1]
        visible[short] = visible_patches(corners[short], shape, windows[short], window, grid)
    return visible, block_indices(corners, shape, grid)


def block(config: MaskingConfig, grid: Grid, sizes: Draws, positions: Draws) -> tuple[np.ndarray, np.ndarray]:
    """One large target block; all the rest is context (table 6, "block")."""
    shape = draw_shape(grid, about(config.hidden), config.target_aspect, "hidden", sizes)
    corners = place(positions, 1, grid, shape)
    return ~block_map(corners, shape, grid).reshape(len(corners), 1, -1), block_indices(corners, shape, grid)


def rasterized(grid: Grid, positions: Draws) -> tuple[np.ndarray, np.ndarray]:
    """One quadrant is the context, the other three are the targets (table 6, "rasterized")."""
    half = (grid[0] // 2, grid[1] // 2)
    corners = np.array([[r, c] for r in (0, half[0]) for c in (0, half[1])])[None]  # [1, 4, 2]
    quadrants = block_indices(corners, half, grid)[0]  # [4, N/4]
    seen = positions.integers(4, 1)  # [B, 1]
    others = (seen + np.arange(1, 4)) % 4  # [B, 3]
    visible = np.zeros((len(seen), 1, grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(visible[:, 0], quadrants[seen[:, 0]], True, axis=1)
    return visible, quadrants[others]


def random(config: MaskingConfig, grid: Grid, positions: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Scattered target patches; all the rest is context (table 6, "random")."""
    patches = grid[0] * grid[1]
    hidden = hidden_count(config.hidden, patches)
    targets = np.sort(positions.uniform(patches).argsort(-1)[:, :hidden], -1)
    visible = np.ones((len(targets), 1, patches), dtype=bool)
    np.put_along_axis(visible[:, 0], targets, False, axis=1)
    return visible, targets[:, None]


# ---------------------------------------------------------------- ragged contexts


def even(visible: np.ndarray, targets: np.ndarray, subset: Draws) -> Masks:
    """Every context keeps a uniformly random subset of its patches, as many as the shortest of the batch has."""
    keys = subset.uniform(*visible.shape[1:])
    keys[~visible] = 2.0
    count = int(visible.sum(-1).min())
    context = np.sort(np.argpartition(keys, count - 1, axis=-1)[..., :count], -1)
    return Masks(torch.from_numpy(context), torch.from_numpy(targets))


def packed(visible: np.ndarray, targets: np.ndarray, subset: Draws) -> Masks:
    """Every context keeps all its patches; rows are padded with their first patch and `lengths` tells."""
    lengths = visible.sum(-1)
    context = np.argsort(~visible, axis=-1, kind="stable")[..., : lengths.max()]
    padding = np.arange(context.shape[-1]) >= lengths[..., None]
    context = np.where(padding, context[..., :1], context)
    return Masks(torch.from_numpy(context), torch.from_numpy(targets), torch.from_numpy(lengths), int(lengths.sum()))

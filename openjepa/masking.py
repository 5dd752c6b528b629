"""Which patches are seen and which are predicted: multi-block masking and the paper's ablations.

I-JEPA, section 3 and table 6 (Assran et al., 2023, https://arxiv.org/abs/2301.08243).
Samplers are pure functions of the grid and of counter-based draws. They run on the host, beside the
image decoding, so masks arrive with their batch and no device ever waits for them.

B images, N = H*W patches in row-major order, M targets of T patches, C contexts of K patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from openjepa.errors import UserError
from openjepa.rng import Draws, key

Grid = tuple[int, int]
Range = tuple[float, float]

MOST_CELLS = 2**22  # patches of the grid, times blocks, of one image: what its masks take while they are made
ATTEMPTS = 20  # redraws of one image's blocks when its context would be too small


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


def sample_share(
    config: MaskingConfig, grid: Grid, seed: int, step: int, slots: np.ndarray, share: np.ndarray
) -> Masks:
    """The masks of a share of a step's slots, as `sample` makes them for all."""
    return sample(config, grid, seed, step, slots).rows(share)


@dataclass(frozen=True, kw_only=True)
class TokenMaskingConfig:
    """Which patches of an image's crops a learned vector stands in for, while the others stay visible (iBOT; BEiT)."""

    shape: Literal["block", "random"] = "block"
    masked: float = 0.5  # share of the crops that are masked at all
    hidden: Range = (0.1, 0.5)  # of those, the share of the patches that is hidden

    def __post_init__(self) -> None:
        low, high = self.hidden
        if not 0 < low <= high < 1:
            raise UserError(f"token_masking.hidden is ({low}, {high}): hide some and leave some, the smaller first")
        if not 0 < self.masked <= 1:
            raise UserError(f"token_masking.masked is {self.masked}: a share above 0, 1 at most")


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


# ---------------------------------------------------------------- strategies


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
    shape = draw_shape(grid, about(config.hidden), config.target_aspect, "target", sizes)
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
    hidden = round(config.hidden * patches)
    targets = np.sort(positions.uniform(patches).argsort(-1)[:, :hidden], -1)
    visible = np.ones((len(targets), 1, patches), dtype=bool)
    np.put_along_axis(visible[:, 0], targets, False, axis=1)
    return visible, targets[:, None]


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
                excluded = max(0, excluded - (tries % ATTEMPTS == 0))
            rows.append(mask.flatten().nonzero()[:, 0])
        contexts.append(rows)
        targets.append([b.flatten().nonzero()[:, 0] for b in blocks])
    shortest = min(len(row) for rows in contexts for row in rows)
    return Masks(
        torch.stack([torch.stack([row[:shortest] for row in rows]) for rows in contexts]),
        torch.stack([torch.stack(rows) for rows in targets]),
    )


# ---------------------------------------------------------------- hidden tokens, visible to a network as one learned vector

BLOCKS, TRIES = 32, 10  # most rectangles of a crop, and draws of each
TOKEN_ASPECT = (0.3, 1 / 0.3)  # height / width


def hide_tokens(config: TokenMaskingConfig, grid: Grid, crops: int, seed: int, step: int, slots: np.ndarray,
                share: np.ndarray) -> TokenMasks:  # fmt: skip
    """Hidden patches of every image's crops, for a share of a step's slots (iBOT, appendix): a function of seed and slot alone."""
    slots = slots[share]
    height, width = grid
    hidden = np.zeros((len(slots) * crops, height, width), dtype=bool)
    draws = Draws(seed, "token masks", (slots[:, None] * crops + np.arange(crops)).ravel())
    whether, share = draws.uniform(2).T
    share = config.hidden[0] + share * (config.hidden[1] - config.hidden[0])
    wanted = np.where(whether < config.masked, (share * height * width).astype(int), 0)
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


# ---------------------------------------------------------------- blocks


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
            f"masking.{what}_scale {scale[0]:g} to {scale[1]:g} of a {height}x{width} grid asks for blocks of {low:.1f} to "
            f"{high:.1f} patches with height / width {aspect[0]:.2f} to {aspect[1]:.2f}, and no whole block is such: "
            f"widen masking.{what}_scale or use smaller patches"
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
    target = draw_shape(grid, config.target_scale, config.target_aspect, "target", sizes)
    context = draw_shape(grid, config.context_scale, relative(config.context_aspect, grid), "context", sizes)
    return target, context


def released_size(grid: Grid, scale: Range, aspect: Range, u: float) -> Grid:
    """The published rule: the same uniform number sets area and aspect; no side as long as the grid's."""
    area = int(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    return min(round(math.sqrt(area * ratio)), grid[0] - 1), min(round(math.sqrt(area / ratio)), grid[1] - 1)


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


# ---------------------------------------------------------------- the door


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
            target = max(h * w for h, w in block_shapes(grid, config.target_scale, config.target_aspect, "target"))
            shapes = block_shapes(grid, config.context_scale, relative(config.context_aspect, grid), "context")
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
            shapes = block_shapes(grid, about(config.hidden), config.target_aspect, "target")
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
            hidden = round(config.hidden * patches)
            if not 0 < hidden <= patches - config.min_keep:
                raise UserError(
                    f"masking.hidden {config.hidden} hides {hidden} of {name}: hide some and leave {config.min_keep} "
                    "(masking.min_keep)"
                )


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

"""Claims about masks: reach, areas, aspects, overlap, fairness, replication, and the door."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openjepa.errors import UserError
from openjepa.masking import (
    MaskingConfig,
    Masks,
    batch_shapes,
    block_shapes,
    check,
    draw_shape,
    even,
    multiblock,
    relative,
    released,
    released_size,
    sample,
)
from openjepa.rng import Draws

GRIDS = [(14, 14), (8, 8), (16, 16), (5, 9), (14, 28)]


def many(config: MaskingConfig, grid: tuple[int, int], steps: int = 60, batch: int = 64) -> list[Masks]:
    return [sample(config, grid, 0, s, np.arange(batch) + s * batch) for s in range(steps)]


def rows(masks: Masks, i: int) -> np.ndarray:
    """The visible patches of one image, without padding."""
    length = masks.context.shape[-1] if masks.lengths is None else int(masks.lengths[i, 0])
    return masks.context[i, 0, :length].numpy()


@pytest.mark.parametrize("context", ["even", "packed"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_patch_is_reached_as_context_and_as_target(grid, context):
    n = grid[0] * grid[1]
    seen, asked = np.zeros(n), np.zeros(n)
    for masks in many(MaskingConfig(context=context), grid):
        for i in range(len(masks)):
            seen[rows(masks, i)] += 1
        np.add.at(asked, masks.targets.numpy().ravel(), 1)
    assert seen.min() > 0
    assert asked.min() > 0


def test_released_behaviour_never_reaches_the_last_row_and_column():
    reached = np.zeros((14, 14), dtype=bool)
    for step in range(20):
        masks = sample(MaskingConfig(behaviour="released"), (14, 14), 0, step, np.arange(32))
        reached.ravel()[masks.targets.numpy().ravel()] = True
        reached.ravel()[masks.context.numpy().ravel()] = True
    assert reached[:-1, :-1].all()
    assert not reached[-1].any()
    assert not reached[:, -1].any()


@pytest.mark.parametrize("strategy", ["multiblock", "block", "rasterized", "random"])
@pytest.mark.parametrize("context", ["even", "packed"])
def test_context_and_targets_never_overlap(strategy, context):
    for masks in many(MaskingConfig(strategy=strategy, context=context), (14, 14), steps=10):
        for i in range(len(masks)):
            assert not np.intersect1d(rows(masks, i), masks.targets[i].numpy()).size


@pytest.mark.parametrize("grid", GRIDS)
def test_areas_stay_within_the_range_asked_for(grid):
    config = MaskingConfig()
    for step in range(300):
        (h, w), (ch, cw) = batch_shapes(config, grid, Draws(0, "mask sizes", [step]))
        assert 0.15 <= h * w / (grid[0] * grid[1]) <= 0.2
        assert 0.85 <= ch * cw / (grid[0] * grid[1]) <= 1.0


def test_areas_and_aspects_are_uniform_and_independent_on_a_fine_grid():
    grid = (128, 128)
    drawn = np.array([draw_shape(grid, (0.15, 0.2), (0.75, 1.5), "target", Draws(0, "t", [s])) for s in range(1500)])
    area, aspect = drawn.prod(1) / 128**2, drawn[:, 0] / drawn[:, 1]
    for values, (low, high) in ((area, (0.15, 0.2)), (aspect, (0.75, 1.5))):
        sorted_share = (np.sort(values) - low) / (high - low)
        distance = np.abs(sorted_share - np.linspace(0, 1, len(values))).max()  # Kolmogorov-Smirnov
        assert distance < 1.63 / np.sqrt(len(values)) + 0.03  # 1 % level, and the rounding to whole patches
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 4 / np.sqrt(len(drawn))


def test_released_behaviour_ties_size_to_aspect():
    sizes = np.array([released_size((128, 128), (0.15, 0.2), (0.75, 1.5), u) for u in np.linspace(0, 1, 200)])
    assert np.corrcoef(sizes.prod(1), sizes[:, 0] / sizes[:, 1])[0, 1] > 0.95


def test_context_blocks_can_cover_the_whole_grid():
    shapes = {batch_shapes(MaskingConfig(), (14, 14), Draws(0, "s", [i]))[1] for i in range(200)}
    assert (14, 14) in shapes
    assert (13, 13) in shapes


def test_positions_are_uniform_over_all_places():
    corners = Draws(0, "p", np.arange(40_000)).integers(np.array([10, 9]), 1, 2)[:, 0]
    counts = np.histogram2d(*corners.T, bins=(10, 9))[0]
    assert abs(counts / (40_000 / 90) - 1).max() < 0.2  # four and more standard errors


def test_evening_drops_patches_without_favour():
    visible = np.zeros((20_000, 1, 20), dtype=bool)
    visible[:, 0, :15] = True
    visible[0, 0, 6:] = False  # one image with six patches shortens all others
    masks = even(visible, np.zeros((20_000, 1, 1), dtype=np.int64), Draws(0, "subset", np.arange(20_000)))
    assert masks.context.shape == (20_000, 1, 6)
    kept = np.bincount(masks.context[1:].numpy().ravel(), minlength=20)
    assert kept[15:].sum() == 0
    assert abs(kept[:15] / (6 / 15 * 19_999) - 1).max() < 0.05


def test_packed_keeps_every_visible_patch():
    config = MaskingConfig(context="packed")
    masks = sample(config, (14, 14), 0, 0, np.arange(64))
    visible, _ = multiblock(config, (14, 14), Draws(0, "mask sizes", [0]), Draws(0, "mask positions", np.arange(64)))
    for i in range(64):
        assert np.array_equal(rows(masks, i), np.flatnonzero(visible[i, 0]))
    assert masks.total == visible.sum()


@pytest.mark.parametrize("strategy", ["multiblock", "block", "rasterized", "random"])
def test_an_image_keeps_its_masks_whoever_shares_its_batch(strategy):
    config = MaskingConfig(strategy=strategy, context="packed")
    whole, alone = sample(config, (14, 14), 3, 7, np.arange(32)), sample(config, (14, 14), 3, 7, np.array([20]))
    assert torch.equal(whole.targets[20], alone.targets[0])
    assert np.array_equal(rows(whole, 20), rows(alone, 0))


def test_several_contexts_and_any_number_of_targets():
    masks = sample(MaskingConfig(contexts=3, targets=6, min_keep=4), (16, 12), 0, 0, np.arange(10))
    assert masks.context.shape[:2] == (10, 3)
    assert masks.targets.shape[:2] == (10, 6)


def test_rasterized_shows_one_quadrant_and_asks_for_three():
    masks = sample(MaskingConfig(strategy="rasterized"), (8, 8), 0, 0, np.arange(64))
    assert masks.context.shape == (64, 1, 16)
    assert masks.targets.shape == (64, 3, 16)
    for i in range(64):
        assert len(set(masks.context[i].ravel().tolist()) | set(masks.targets[i].ravel().tolist())) == 64


@pytest.mark.parametrize("strategy", ["block", "random"])
def test_ablations_hide_the_share_asked_for(strategy):
    masks = sample(MaskingConfig(strategy=strategy, hidden=0.6), (14, 14), 0, 0, np.arange(8))
    assert abs(masks.targets.shape[-1] / 196 - 0.6) <= 0.06
    assert masks.context.shape[-1] + masks.targets.shape[-1] == 196


def test_released_masks_equal_the_published_ones_bit_for_bit(golden):
    tensors = load_file(golden / "masks_released.safetensors")
    for name, about in json.loads((golden / "masks_released.json").read_text()).items():
        side = about["img"] // about["patch"]
        config = MaskingConfig(behaviour="released", min_keep=about["min_keep"])
        positions = torch.Generator().manual_seed(about["global_seed"])
        for i in range(3):
            masks = released(config, (side, side), torch.Generator().manual_seed(i), positions, about["batch"])
            assert torch.equal(masks.context[:, 0], tensors[f"{name}.iter{i}.context"])
            assert torch.equal(masks.targets.transpose(0, 1), tensors[f"{name}.iter{i}.targets"])
        for seed, (h, w, ch, cw) in enumerate(about["block_sizes_for_seed_0_to_63"]):
            generator = torch.Generator().manual_seed(seed)
            u, v = (torch.rand(1, generator=generator).item() for _ in range(2))
            assert released_size((side, side), (0.15, 0.2), (0.75, 1.5), u) == (h, w)
            assert released_size((side, side), (0.85, 1.0), (1.0, 1.0), v) == (ch, cw)


@pytest.mark.parametrize(
    ("settings", "grid", "says"),
    [
        ({}, (4, 4), "2.4 to 3.2 patches"),
        ({"targets": 50}, (14, 14), "50 targets"),
        ({"min_keep": 150}, (14, 14), "keeps 133"),
        ({"behaviour": "released"}, (6, 6), "smallest target block is 2x2 = 4"),
        ({"strategy": "rasterized"}, (7, 8), "odd side"),
        ({"strategy": "random", "hidden": 0.99}, (4, 4), "hides 16"),
        ({"strategy": "block", "hidden": 0.95, "min_keep": 20}, (14, 14), "below min_keep"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_with_the_arithmetic(settings, grid, says):
    with pytest.raises(UserError, match=says):
        check(MaskingConfig(**settings), grid)


@pytest.mark.parametrize(
    "settings",
    [{"targets": 0}, {"target_scale": (0.3, 0.2)}, {"context_aspect": (0.0, 1.0)}, {"hidden": 1.0},
     {"behaviour": "released", "strategy": "random"}, {"behaviour": "released", "context": "packed"}],
)  # fmt: skip
def test_contradictions_are_refused(settings):
    with pytest.raises(UserError, match="masking"):
        MaskingConfig(**settings)


def test_crowded_settings_end_in_bounded_time_and_still_keep_enough():
    """Past the door on purpose: 40 targets hide everything, so each image falls back on coinciding targets."""
    masks = sample(MaskingConfig(targets=40, context="packed"), (14, 14), 0, 0, np.arange(16))
    assert masks.lengths is not None
    assert masks.lengths.min() >= 10


def test_shapes_on_small_grids():
    assert block_shapes((8, 8), (0.15, 0.2), (0.75, 1.5), "target") == [(3, 4), (4, 3)]
    assert relative((1.0, 1.0), (14, 28)) == (0.5, 0.5)

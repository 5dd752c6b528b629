"""`ijepa_auto`: a recipe chosen for some images, this machine and a time, by rules that are said with their reasons.

The rules are what docs/small-data.md found; whoever knows better gives a value, or saves the recipe and changes it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from openjepa.data.augment import centre_crop
from openjepa.data.decode import BadImage, Box, decode
from openjepa.data.order import epoch_order
from openjepa.data.sources import Source, open_source
from openjepa.data.stream import steps_per_epoch
from openjepa.engine.device import pick_device
from openjepa.engine.monitors import MonitorsConfig
from openjepa.errors import UserError
from openjepa.masking import MaskingConfig
from openjepa.recipes.budget import pace, seconds_of
from openjepa.recipes.ijepa import CPU, GPU, HIDDEN, after_painting
from openjepa.recipes.recipe import Recipe, from_dict, nested, override

LOOKED_AT = 256  # images whose sizes and colours stand for all
SIDES = {"cpu": (32, 64, 96), "cuda": (32, 64, 96, 160, 224)}  # pixels that are trained at
PATCHES = {32: 4, 64: 8, 96: 12, 160: 16, 224: 16}  # pixels a side, for each of them
BATCH = {"cpu": 32, "cuda": 128}
FEW_STEPS = 1000  # of I-JEPA, below which little is learned
SMALL = 8  # patches a side, up to which random masks were tried
PAINTED = 0.2  # of the time goes to painting pixels, which teaches much at once and then little more
SMALLEST_RATE, RATE = 8e-4, 5e-4  # of images of 32 pixels, and of larger ones: photographs learned less at 1e-3
LOOKS, PAINTING_LOOKS = 10, 3  # checkpoints, k-NN where they are cheap, and five times as many log lines
LOOK_LEAST = 2000  # images of a look: among fewer 50 classes have too few neighbours to tell, so rather fewer looks
LOOK_COST = 0.12  # images of all looks, as a share of those trained on: about a twentieth of the time


@dataclass(frozen=True)
class Chosen:
    """A recipe, and why it has its values: (what, why) in the order they were chosen in."""

    recipe: Recipe
    reasons: list[tuple[str, str]]


@dataclass(frozen=True)
class Known:
    """What the choice is made by."""

    kind: str  # cpu or cuda
    budget: str
    told: Sequence[str]  # values that were not chosen
    images: int
    looked: int  # images that were
    short: int  # pixels, the median of their shorter sides


def choose(spec: str, budget: str, values: Mapping[str, str] | None = None) -> Chosen:
    """A recipe for these images whose training takes about the budget (90s, 30min, 2h) on this machine.

    values: of the command line, which hold whatever would be chosen. Raises UserError.
    """
    seconds, values = seconds_of(budget), values or {}
    if length := next((name for name in values if name.endswith("epochs")), None):
        raise UserError(
            f"--{length}: the budget says how long; print the recipe and change it there, or leave this out"
        )
    kind = "cuda" if pick_device(values.get("machine.device", "auto")).type == "cuda" else "cpu"
    source = open_source(spec)
    sizes = [size for _, size in looked_at(source, 8)]
    if not sizes:
        raise UserError(f"{spec}: none of {min(LOOKED_AT, len(source))} images could be read")
    known = Known(kind, budget, [*values], len(source), len(sizes), int(median(map(min, sizes))))
    side = max((s for s in SIDES[kind] if s <= known.short), default=SIDES[kind][0])
    if (told := nested(values).get("model", {}).get("image_size")) in PATCHES:
        side = told
    plan = partial(
        after_painting,
        networks=CPU if kind == "cpu" else GPU,
        image=side,
        patch=PATCHES[side],
        colours=colours([pixels for pixels, _ in looked_at(source, side)]),  # smaller ones would be smoother
        rate=SMALLEST_RATE if side == SIDES[kind][0] else RATE,
        batch=min(BATCH[kind], len(source)),
        masking=HIDDEN if side // PATCHES[side] <= SMALL else MaskingConfig(),
    )
    trial = override(plan(painted=1, epochs=1, ema=momenta(1)), values)
    if trial.method != "ijepa":
        raise UserError(f"method {trial.method}: a recipe is chosen for ijepa alone")
    before = trial.before()
    stages = [before, replace(trial, first={})] if before else [trial]
    shares = [PAINTED * seconds, (1 - PAINTED) * seconds] if before else [seconds]
    per_epoch = [steps_per_epoch(len(source), run.data.batch_size) for run in stages]
    print("measuring how fast this machine trains: a minute or two", file=sys.stderr, flush=True)
    paces = [pace(run, spec, each, s) for run, each, s in zip(stages, per_epoch, shares, strict=True)]
    steps = [
        max(1, round(s * speed / run.data.batch_size)) for run, s, speed in zip(stages, shares, paces, strict=True)
    ]
    epochs = [digits(count / each) for count, each in zip(steps, per_epoch, strict=True)]
    recipe = plan(painted=epochs[0], epochs=epochs[-1], ema=momenta(steps[-1]))
    size = look_size(sum(count * run.data.batch_size for count, run in zip(steps, stages, strict=True)), len(source))
    own = watched(steps[-1], LOOKS, epochs[-1], trial.data.batch_size, shares[-1], size)
    if before:
        looked = watched(steps[0], PAINTING_LOOKS, epochs[0], before.data.batch_size, shares[0], size)
        own["first"] = {**recipe.first, **looked}
    recipe = override(from_dict(Recipe, own, base=recipe), values)
    return Chosen(recipe, reasons(recipe, known, steps, paces))


def look_size(crops: int, images: int) -> int:
    """Images of each k-NN look at a run of so many crops; one number for both stages, as a k-NN among more images is higher."""
    share = round(LOOK_COST * crops / (LOOKS + PAINTING_LOOKS))
    return max(10, min(images, MonitorsConfig().knn_images, max(LOOK_LEAST, share)))


def watched(steps: int, looks: int, epochs: float, batch: int, seconds: float, size: int) -> dict[str, Any]:
    """So many looks of so many images at most, log lines and checkpoints, as shares of a run, whatever an epoch is: looks take a
    small part of the time, and a checkpoint is never more than ten minutes old."""
    affordable = min(looks, round(LOOK_COST * steps * batch) // size)
    monitors = {
        "log_every": max(1, steps // (5 * looks)),
        "knn_every": digits(epochs / affordable) if affordable else 0,
        "knn_images": size,
    }
    return {
        "monitors": monitors,
        "machine": {"checkpoint_every": digits(epochs / max(looks, math.ceil(seconds / 600)))},
    }


def reasons(recipe: Recipe, known: Known, steps: Sequence[int], paces: Sequence[float]) -> list[tuple[str, str]]:
    """Why a recipe has its values. steps, paces: of its stages, and their images a second."""
    model, predictor, batch, (first, last) = recipe.model, recipe.predictor, recipe.data.batch_size, recipe.schedule.ema
    (side, _), (rows, columns), cpu = model.image_size, model.grid, known.kind == "cpu"
    a, small, before = "a CPU" if cpu else "a GPU", rows <= SMALL, recipe.before()
    slow = f"; in fewer than {FEW_STEPS} little is learned: give it more time"

    def why(reason: str, *names: str) -> str:
        return "as told" if any(told.startswith(names) for told in known.told) else reason

    found = [
        (f"images of {side}x{side} pixels", why(f"the shorter side's median is {known.short}; on {a} at most "
         f"{SIDES[known.kind][-1]}" + ("; smaller ones are enlarged" if known.short < side else ""), "model.image_size")),
        (f"patches of {model.patch_size} pixels, a grid of {rows}x{columns}",
         why("the only grid that was tried on a CPU" if small else "what a GPU has the time for", "model.patch_size")),
        (f"an encoder {model.dim} wide and {model.n_blocks} deep, a predictor of {predictor.width}x{predictor.depth}",
         why(f"what {a} trains long enough in minutes", "model.size", "model.width", "model.depth", "predictor.")),
        (f"normalised by mean {recipe.data.mean} and deviation {recipe.data.std}",
         why(f"measured on {known.looked} images", "data.mean", "data.std")),
        (f"batches of {batch}", why("all there are" if batch < BATCH[known.kind] else
         "from the same images more steps teach more than larger batches" if cpu else "what keeps a GPU busy",
         "data.batch_size")),
    ]  # fmt: skip
    if before:
        found.append(
            (f"first {steps[0]:,} steps, {before.schedule.epochs:,.1f} epochs, of painting hidden patches (MAE)",
             f"{PAINTED:.0%} of {known.budget} at {paces[0]:,.0f} images/s: pixels teach much at once, and features of a "
             "network that knows nothing do not"))  # fmt: skip
    found += [
        (f"{'then ' if before else ''}{steps[-1]:,} steps, {recipe.schedule.epochs:,.1f} epochs of {known.images:,} images",
         f"{'the rest' if before else known.budget} at {paces[-1]:,.0f} images/s here"
         + ("" if steps[-1] >= FEW_STEPS else slow)),
        ("a predictor that begins with " + ("Xavier's weights" if model.init == "xavier" else f"{model.init} weights"),
         why("smaller ones would hold back what the encoder has learned", "model.init")),
        (f"a learning rate of {recipe.optim.lr:g}",
         why("as on a CPU; no other was tried" if not cpu else "CIFAR-10's small images like it high"
             if side == SIDES["cpu"][0] else "larger photographs are painted better at it than at twice as much", "optim.lr")),
        ("three quarters of the patches hidden" if recipe.masking == HIDDEN else
         "the paper's blocks hidden" if recipe.masking == MaskingConfig() else f"masks of strategy {recipe.masking.strategy}",
         why("on a grid this small it teaches at least as well as blocks, in less time" if small else
             "nothing else was tried on grids so large", "masking.")),
        (f"EMA from {first} to {last}",
         why("the target encoder averages over {:,.0f} steps at first, {:,.0f} at last: shares of the run that worked"
             .format(*windows(steps[-1])), "schedule.ema")),
    ]  # fmt: skip
    return found


def digits(number: float) -> float:
    """To six digits, whatever its size."""
    return float(f"{number:.6g}")


def windows(steps: int) -> tuple[float, float]:
    """Steps that the target encoder averages over at the first and at the last step."""
    return max(250, 0.027 * steps), max(500, 0.16 * steps)


def momenta(steps: int) -> tuple[float, float]:
    """Of the target encoder at the first and last step."""
    first, last = (1 - float(f"{1 / window:.2g}") for window in windows(steps))
    return round(first, 12), round(last, 12)


def looked_at(source: Source, side: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Some images, uint8 [side, side, 3] of their middle, and their own (width, height). What cannot be read is passed over."""
    for index in epoch_order(0, "auto", 0, len(source))[np.arange(min(LOOKED_AT, len(source)))]:
        sizes: list[tuple[int, int]] = []

        def middle(width: int, height: int, sizes: list[tuple[int, int]] = sizes) -> Box:
            sizes.append((width, height))
            return centre_crop(width, height, (side, side))

        try:
            pixels = decode(source.read(int(index)), middle, (side, side))
        except (BadImage, OSError):
            continue
        yield pixels, sizes[-1]


def colours(images: Sequence[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, images in [0, 1]."""
    pixels = np.stack(images).reshape(-1, 3) / 255
    mean, std = pixels.mean(0), pixels.std(0).clip(0.02)
    return tuple(round(float(x), 3) for x in mean), tuple(round(float(x), 3) for x in std)

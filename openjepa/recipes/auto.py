"""`ijepa_auto`: a recipe chosen for some images, this machine and a time, by rules that are said with their reasons.

The rules are what docs/small-data.md found; whoever knows better saves the recipe and changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from openjepa.data.augment import centre_crop
from openjepa.data.decode import BadImage, Box, decode
from openjepa.data.sources import Source, open_source
from openjepa.data.stream import DataConfig, steps_per_epoch
from openjepa.engine.device import pick_device, pick_precision
from openjepa.engine.monitors import MonitorsConfig
from openjepa.engine.optim import OptimConfig, ScheduleConfig
from openjepa.errors import UserError
from openjepa.masking import MaskingConfig
from openjepa.recipes.budget import pace, seconds_of
from openjepa.recipes.ijepa import CPU, GPU, HIDDEN, painting
from openjepa.recipes.recipe import Recipe
from openjepa.rng import permutation

NAME = "ijepa_auto"
LOOKED_AT = 256  # images whose sizes and colours stand for all
SIDES = {"cpu": (32, 64, 96), "cuda": (32, 64, 96, 160, 224)}  # pixels that are trained at
PATCHES = {32: 4, 64: 8, 96: 12, 160: 16, 224: 16}  # pixels a side, for each of them
FEW_STEPS = 1500  # below which nothing was seen to be learned
SMALL = 8  # patches a side, up to which random masks were tried
PAINTED = 0.2  # of the time goes to painting pixels, which teaches much at once and then no more
SMALLEST_RATE, RATE = 8e-4, 5e-4  # at 1e-3 images of 32 pixels learn best, and photographs lose what they learned
ALONE = 200  # steps in which the new predictor learns, and the painted encoder not yet


@dataclass(frozen=True)
class Chosen:
    """A recipe, and why it has its values: (what, why) in the order they were chosen in."""

    recipe: Recipe
    reasons: list[tuple[str, str]] = field(default_factory=list)


def choose(spec: str, budget: str, device: str = "auto", seed: int = 0) -> Chosen:
    """A recipe for these images that takes about the budget (90s, 30min, 2h) on this machine. Raises UserError."""
    seconds, on = seconds_of(budget), pick_device(device)
    kind = "cuda" if on.type == "cuda" else "cpu"
    source = open_source(spec)
    sizes = [size for _, size in looked_at(source, seed, 8)]
    if not sizes:
        raise UserError(f"{spec}: none of {LOOKED_AT} images could be read")
    short = int(median(min(size) for size in sizes))
    side = max((s for s in SIDES[kind] if s <= short), default=SIDES[kind][0])
    model, predictor = CPU if kind == "cpu" else GPU
    model = replace(model, image_size=(side, side), patch_size=PATCHES[side])
    grid = side // model.patch_size
    batch = 32 if kind == "cpu" else 128
    mean, std = colours(source, side, seed)
    rate = SMALLEST_RATE if side == SIDES[kind][0] else RATE
    begun = Recipe(
        seed=seed,
        precision=pick_precision("auto", on),
        model=model,
        predictor=predictor,
        masking=HIDDEN if grid <= SMALL else MaskingConfig(),
        data=DataConfig(batch_size=batch, mean=mean, std=std),
        optim=OptimConfig(lr=rate, start_lr=rate / 10, final_weight_decay=0.04, betas=(0.9, 0.95)),
        schedule=ScheduleConfig(epochs=1, warmup_epochs=0.06),
        monitors=MonitorsConfig(knn_every=0),
        machine=replace(Recipe().machine, device=device),
    )
    per_epoch = steps_per_epoch(len(source), batch)
    before = replace(begun, first=painting(predictor, rate)).before()
    assert before is not None
    painted, speed = (
        pace(before, spec, per_epoch, PAINTED * seconds),
        pace(begun, spec, per_epoch, (1 - PAINTED) * seconds),
    )
    first = epochs_in(PAINTED * seconds, painted, batch, per_epoch)
    epochs = epochs_in((1 - PAINTED) * seconds, speed, batch, per_epoch)
    steps = round(epochs * per_epoch)
    ema, alone = momenta(steps), min(ALONE, steps // 10)
    recipe = replace(
        begun,
        first=painting(predictor, rate, first),
        predictor=replace(predictor, alone_epochs=round(alone / per_epoch, 4)),
        schedule=replace(begun.schedule, epochs=epochs, warmup_epochs=round(0.06 * epochs, 3), ema=ema),
        monitors=MonitorsConfig(log_every=max(1, steps // 50)),
    )
    enough = "" if steps >= FEW_STEPS else f"; fewer than {FEW_STEPS} have taught nothing so far: give it more time"
    reasons = [
        (f"images of {side}x{side} pixels", f"the shorter side's median is {short}; on {a(kind)} at most {SIDES[kind][-1]}"),
        (f"patches of {model.patch_size} pixels, a grid of {grid}x{grid}", "masks need 8 a side, and more cost time"),
        (f"an encoder {model.dim} wide and {model.n_blocks} deep, a predictor of {predictor.width}x{predictor.depth}",
         f"what {a(kind)} trains long enough in minutes"),
        (f"normalised by mean {mean} and deviation {std}", f"measured on {len(sizes)} images"),
        (f"batches of {batch}", "from the same images more steps teach more than larger batches"),
        (f"first {first:.2g} epochs of painting hidden patches (MAE)", f"{PAINTED:.0%} of {budget} at {painted:.0f} images/s: "
         "pixels teach much at once, and features of a network that knows nothing do not"),
        (f"then {steps} steps, {epochs:.2g} epochs of {len(source)} images", f"the rest at {speed:.0f} images/s here{enough}"),
        (f"the predictor alone for {alone} of them", "it begins from chance, and would undo what was learned"),
        (f"a learning rate of {rate:g}", "as this size was seen to learn" if kind == "cpu" else "as on a CPU; no other was tried"),
        ("three quarters of the patches hidden", "so a grid this small learns at least as well, in less time than by blocks")
        if grid <= SMALL
        else ("the paper's blocks hidden", "nothing else was tried on grids so large"),
        (f"EMA from {ema[0]} to {ema[1]}", "the target encoder averages over 3 % of the steps at first, 16 % at last, but never "
         "over fewer than 250: a quick one collapses"),
    ]  # fmt: skip
    return Chosen(recipe, reasons)


def epochs_in(seconds: float, speed: float, batch: int, per_epoch: int) -> float:
    """Whole steps of so many images a second, in epochs; one at least."""
    return max(1e-4, round(max(1, round(seconds * speed / batch)) / per_epoch, 4))


def a(kind: str) -> str:
    return "a CPU" if kind == "cpu" else "a GPU"


def momenta(steps: int) -> tuple[float, float]:
    """Of the target encoder at the first and last step: it averages over shares of the run that were seen to work."""
    return round(1 - 1 / max(250, 0.027 * steps), 4), round(1 - 1 / max(500, 0.16 * steps), 4)


def looked_at(source: Source, seed: int, side: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Some images, uint8 [side, side, 3] of their middle, and their own (width, height). What cannot be read is passed over."""
    for index in permutation(seed, "auto", 0, len(source))[:LOOKED_AT]:
        sizes: list[tuple[int, int]] = []

        def middle(width: int, height: int, sizes: list[tuple[int, int]] = sizes) -> Box:
            sizes.append((width, height))
            return centre_crop(width, height, (side, side))

        try:
            pixels = decode(source.read(int(index)), middle, (side, side))
        except (BadImage, OSError):
            continue
        yield pixels, sizes[-1]


def colours(source: Source, side: int, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, images in [0, 1]."""
    pixels = np.stack([pixels for pixels, _ in looked_at(source, seed, side)]).reshape(-1, 3) / 255
    mean, std = pixels.mean(0), pixels.std(0).clip(0.02)
    return tuple(round(float(x), 3) for x in mean), tuple(round(float(x), 3) for x in std)

"""A recipe for so much time: what fits into it is measured, and what a recipe does in epochs is stretched over it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from openjepa.engine.run import read_metrics
from openjepa.errors import UserError
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe

PACE_STEPS = 40  # that show it, the first half to warm up
UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(budget: str) -> float:
    """30min, 90s, 1.5h. Raises UserError."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", budget)) or not float(match[1]):
        raise UserError(f"--budget {budget}: give a time such as 90s, 30min or 2h")
    return float(match[1]) * UNITS[match[2]]


def pace(recipe: Recipe, spec: str, per_epoch: int) -> float:
    """Images that a recipe trains on in a second, here and now."""
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            stretched(recipe, PACE_STEPS, per_epoch, PACE_STEPS // 2), spec, Path(folder) / "pace", Console(quiet=True)
        )
        speed: float = read_metrics(Path(folder) / "pace")[-1]["images_per_s"]
        return speed


def stretched(recipe: Recipe, steps: int, per_epoch: int, every: int) -> Recipe:
    """A recipe for so many steps: what it does in epochs is done in the same share of the run; a checkpoint and a log line
    every so many steps."""
    epochs = steps / per_epoch
    factor = epochs / recipe.schedule.epochs
    ibot = replace(
        recipe.ibot,
        temperature_epochs=round(recipe.ibot.temperature_epochs * factor),
        freeze_last_layer=recipe.ibot.freeze_last_layer * factor,
    )
    return replace(
        recipe,
        ibot=ibot,
        predictor=replace(recipe.predictor, alone_epochs=recipe.predictor.alone_epochs * factor),
        schedule=replace(recipe.schedule, epochs=epochs, warmup_epochs=recipe.schedule.warmup_epochs * factor),
        monitors=replace(recipe.monitors, log_every=every, knn_every=0),
        machine=replace(recipe.machine, checkpoint_every=every / per_epoch, keep=steps // every + 1),
    )

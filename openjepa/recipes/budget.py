"""A recipe for so much time: what fits into it is measured, and what a recipe does in epochs is stretched over it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from openjepa.engine.run import Interrupted, read_metrics
from openjepa.errors import UserError
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe

PACE_STEPS = 40  # at least, that show it, the first half to warm up
PACE_SHARE, PACE_SECONDS = 0.03, 15.0  # of the budget, and at most, that it is watched for: machines have moods
UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(budget: str) -> float:
    """30min, 90s, 1.5h. Raises UserError."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", budget)) or not float(match[1]):
        raise UserError(f"--budget {budget}: give a time such as 90s, 30min or 2h")
    return float(match[1]) * UNITS[match[2]]


def pace(recipe: Recipe, spec: str, per_epoch: int, seconds: float) -> float:
    """Images that a recipe trains on in a second, here and now, for a run of so many seconds."""
    speed = pace_of(recipe, spec, per_epoch, PACE_STEPS // 2)
    steps = int(min(PACE_SHARE * seconds, PACE_SECONDS) * speed / recipe.data.batch_size)
    return pace_of(recipe, spec, per_epoch, steps) if steps > PACE_STEPS // 2 else speed


def pace_of(recipe: Recipe, spec: str, per_epoch: int, steps: int) -> float:
    """Images a second in so many steps, after as many more."""
    with tempfile.TemporaryDirectory() as folder:
        plan = stretched(recipe, 2 * steps, per_epoch, steps)
        machine = replace(plan.machine, checkpoint_every=plan.schedule.epochs)  # none while it is timed
        data = replace(plan.data, max_bad=1.0)  # how many are bad is told where the list of them stays
        plan = replace(plan, machine=machine, data=data)
        try:
            pretrain(plan, spec, Path(folder) / "pace", Console(quiet=True))
        except Interrupted as stop:
            raise Interrupted("nothing was begun yet", stop.status) from stop
        speed: float = read_metrics(Path(folder) / "pace")[-1]["images_per_s"]
        return speed


def stretched(recipe: Recipe, steps: int, per_epoch: int, every: int) -> Recipe:
    """A recipe for so many steps: what it does in epochs is done in the same share of the run; a checkpoint and a log line
    every so many steps."""
    epochs = steps / per_epoch
    factor = epochs / recipe.schedule.epochs
    parts = {name: stretched_part(getattr(recipe, name), factor) for name in recipe.__dataclass_fields__}
    return replace(
        recipe,
        **{
            **parts,
            "schedule": replace(parts["schedule"], epochs=epochs),
            "monitors": replace(recipe.monitors, log_every=every, knn_every=0),
            "machine": replace(recipe.machine, checkpoint_every=every / per_epoch, keep=steps // every + 1),
        },
    )


def stretched_part(part: Any, factor: float) -> Any:
    """Of a recipe's part, all values whose names end in `epochs`, times a factor."""
    names = [name for name in getattr(part, "__dataclass_fields__", ()) if name.endswith("epochs")]
    told = {name: getattr(part, name) for name in names if getattr(part, name) is not None}
    return replace(part, **{name: factor * value for name, value in told.items()}) if told else part

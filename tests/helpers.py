"""What several test files need to move weights about."""

from __future__ import annotations

from pathlib import Path

import torch

from openjepa.convert import formats
from openjepa.convert.names import Told
from openjepa.recipes.exchange import import_weights
from openjepa.recipes.recipe import Recipe

HEADS = Told(heads=2)  # of the tiny model, whose width no known size has


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def imported(source: object, out: Path, base: Recipe | None = None, told: Told = HEADS, **values: str) -> Path:
    import_weights(formats.read(str(source), told), str(source), out, base, values)
    return out

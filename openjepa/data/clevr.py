"""CLEVR (Johnson et al., 2017) and its two low-level tasks, Clevr/Count and Clevr/Dist, as VTAB defines them.

`clevr:ROOT[:SPLIT]` reads CLEVR v1.0 as it is unpacked: ROOT/images/train/*.png and ROOT/scenes/CLEVR_train_scenes.json,
the same for val. Its own test scenes have no labels; everybody tests on val.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openjepa.data.sources import Source, local_path, stamp
from openjepa.errors import UserError, first_line, nearest

COUNTS = (3, 10)  # objects in a scene
DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)  # thresholds on the depth of the nearest object
CLASSES = {
    "count": [str(n) for n in range(COUNTS[0], COUNTS[1] + 1)],
    "distance": [f"to {d:g}" for d in DISTANCES] + [f"over {DISTANCES[-1]:g}"],
}

# Of CLEVR's files, and which of their scenes: from a share to a share, at most so many. VTAB's test is CLEVR's val.
Part = tuple[float, float, int | None]
SPLITS: dict[str, tuple[str, list[Part]]] = {
    "train": ("train", [(0, 1, None)]),
    "val": ("val", [(0, 1, None)]),
    "vtab-train": ("train", [(0, 0.9, None)]),
    "vtab-val": ("train", [(0.9, 1, None)]),
    "vtab-test": ("val", [(0, 1, None)]),
    "vtab-train800": ("train", [(0, 0.9, 800)]),
    "vtab-val200": ("train", [(0.9, 1, 200)]),
    "vtab-train800val200": ("train", [(0, 0.9, 800), (0.9, 1, 200)]),
}


def count_and_distance(depths: Sequence[float]) -> dict[str, int]:
    """The classes of a scene. depths: of every object's centre along the view, CLEVR's pixel_coords[2]."""
    return {"count": len(depths) - COUNTS[0], "distance": sum(threshold < min(depths) for threshold in DISTANCES)}


class Clevr(Source):
    """One split, in the order of CLEVR's file."""

    whole = True

    def __init__(self, rest: str) -> None:
        root, _, split = rest.rpartition(":") if rest.rpartition(":")[2] in SPLITS else (rest, "", "train")
        (self.root, _), self.spec = local_path(root), rest
        if not self.root.is_dir():
            hint = nearest(rest.rpartition(":")[2], SPLITS) if ":" in rest else ""
            raise UserError(
                f"data 'clevr:{rest}': no such folder{hint} (clevr:ROOT[:SPLIT], one of {', '.join(SPLITS)})"
            )
        self.part, parts = SPLITS[split]
        scenes = read_scenes(self.root / "scenes" / f"CLEVR_{self.part}_scenes.json")
        n = len(scenes)
        chosen = [s for first, last, most in parts for s in scenes[round(first * n) : round(last * n)][:most]]
        low, high = COUNTS
        if odd := [name for name, depths in chosen if not low <= len(depths) <= high]:
            raise UserError(f"data 'clevr:{rest}': {odd[0]} has not {low} to {high} objects, as CLEVR's scenes have")
        self.files = [name for name, _ in chosen]
        labels = [count_and_distance(depths) for _, depths in chosen]
        self.classes = CLASSES
        self.labels = {task: np.array([label[task] for label in labels], dtype=np.int64) for task in CLASSES}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        with open(self.root / "images" / self.part / self.files[index], "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return self.files[index]

    def stamps(self) -> list[str]:
        return [stamp(self.root / "images" / self.part / file) for file in self.files]


def read_scenes(file: Path) -> list[tuple[str, list[float]]]:
    """Every scene's image file and its objects' depths. Raises UserError."""
    try:
        found: list[dict[str, Any]] = json.loads(file.read_text())["scenes"]
        if not found:
            raise ValueError("it has none")
        return [
            (os.path.basename(s["image_filename"]), [float(o["pixel_coords"][2]) for o in s["objects"]]) for s in found
        ]
    except OSError as error:
        raise UserError(f"CLEVR's scenes {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{file} is not a file of CLEVR's scenes ({type(error).__name__}: {first_line(error)})"
        ) from error

"""Embedded images: CLEVR-like scenes, ray-cast in NumPy, so that everything runs offline.

After CLEVR (Johnson et al., 2017): 3 to 10 spheres, cubes and cylinders of two sizes, two materials and eight colours
stand on a ground plane under a lamp with soft shadows, seen in perspective by a jittered camera. The k-th scene is a
function of (seed, k). Tasks: the number of objects, the distance of the nearest (VTAB's six classes), its colour and
its shape. Lengths are CLEVR's units; the camera stands about 11 from the centre.

`scenes:N:odd` are the same scenes, but in half of them the object that shows most has a texture, of three.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from multiprocessing import current_process
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from openjepa.data import clevr
from openjepa.data.clevr import COUNTS, count_and_distance
from openjepa.data.raycast import COLORS, MATERIALS, SHAPES, TEXTURES, Object, Scene, annotate, cast, render
from openjepa.data.sources import Source, cache_folder
from openjepa.data.workers import loaded
from openjepa.errors import UserError
from openjepa.rng import Draws

VERSION = 2  # raise it when any pixel or label changes: caches and runs of another version are not gone on with
SIZES = (0.35, 0.7)  # radius of the circle that an object stands in
HORIZON = 20.0  # depths beyond it count as unknown
MARGIN = 0.15  # free ground between two objects
REACH = 3.0  # objects stand within [-REACH, REACH] on both axes

CLASSES = {**clevr.CLASSES, "color": list(COLORS), "shape": list(SHAPES)}
ODD = ["normal", "odd"]  # classes of the images and of the pixels of scenes:N:odd
GLANCE = (64, 64)  # rays that tell which object shows most


def labels(scene: Scene) -> dict[str, int]:
    """The class of a scene in each task; colour and shape are those of the nearest object."""
    closest = min(scene.objects, key=scene.depth)
    depths = [scene.depth(thing) for thing in scene.objects]
    return {**count_and_distance(depths), "color": closest.color, "shape": closest.shape}


# ---------------------------------------------------------------- composition


def compose(seed: int, k: int) -> Scene:
    """The k-th scene of a seed."""
    draws = Draws(seed, "scene", [k])
    u = draws.uniform(10)[0]
    count = COUNTS[0] + int(u[0] * (COUNTS[1] - COUNTS[0] + 1))
    eye = np.array([7.3, -6.4, 5.3]) + (u[1:4] - 0.5)
    lamp = np.array([1.5, -6.5, 8.0]) + 2 * (u[4:7] - 0.5)
    forward = np.array([0.0, 0.0, 0.35]) + 0.6 * (u[7:10] - 0.5) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    view = np.stack([right, np.cross(right, forward), forward])
    while True:  # a handful of crowded layouts are begun again; every round reads new numbers
        objects = arrange(draws.uniform(count, 40, 2)[0], draws.uniform(count, 5)[0])
        if objects:
            return Scene(objects, eye, view, lamp)


def arrange(places: np.ndarray, traits: np.ndarray) -> list[Object]:
    """Objects that do not touch, or none if they do not fit. places [count, tries, 2], traits [count, 5]."""
    objects: list[Object] = []
    for candidates, (a, b, c, d, e) in zip(places, traits, strict=True):
        radius = SIZES[int(a * len(SIZES))]
        for x, y in ((2 * candidates - 1) * (REACH - 0.3)).tolist():
            if all(math.hypot(x - o.x, y - o.y) > radius + o.radius + MARGIN for o in objects):
                break
        else:
            return []
        shape, color, material = int(b * len(SHAPES)), int(c * len(COLORS)), int(d * len(MATERIALS))
        objects.append(Object(shape, radius, color, material, x, y, 2 * math.pi * float(e)))
    return objects


def compose_odd(seed: int, k: int) -> tuple[Scene, int | None]:
    """The k-th scene of a seed, in half of all cases with an odd object, the one that shows most; and which one that is."""
    scene, u = compose(seed, k), oddness(seed, [k])[0]
    if u[0] < 0.5:
        return scene, None
    owner = cast(scene, *GLANCE).owner
    odd = int(np.bincount(owner[owner >= 0], minlength=len(scene.objects)).argmax())
    things = [*scene.objects]
    things[odd] = replace(things[odd], texture=1 + int(u[1] * (len(TEXTURES) - 1)))
    return replace(scene, objects=things), odd


def oddness(seed: int, scenes: list[int] | np.ndarray) -> np.ndarray:
    """Two numbers a scene: odd from a half on, and which texture then. float64 [n, 2]."""
    return Draws(seed, "odd scene", scenes).uniform(2)


# ---------------------------------------------------------------- the source


class Job(NamedTuple):
    """Scenes to render."""

    seed: int
    first: int
    last: int
    size: tuple[int, int]
    odd: bool = False


class Scenes(Source):
    """Scenes first to last - 1, rendered once at one size and kept in the cache, memory-mapped."""

    def __init__(self, first: int, last: int, size: tuple[int, int], seed: int = 0, odd: bool = False) -> None:
        self.first, self.last, self.size, self.seed, self.odd = first, last, size, seed, odd
        self.classes = CLASSES | ({"odd": ODD} if odd else {})
        self.maps = {"objects": ["ground", *SHAPES], "depth": None} | ({"odd": ODD} if odd else {})
        self._pixels: np.ndarray | None = None
        found = [labels(compose(seed, k)) for k in range(first, last)]
        self.labels = {task: np.array([label[task] for label in found], dtype=np.int64) for task in CLASSES}
        if odd:
            self.labels["odd"] = (oddness(seed, np.arange(first, last))[:, 0] >= 0.5).astype(np.int64)

    @classmethod
    def from_spec(cls, rest: str, size: tuple[int, int]) -> Scenes:
        """scenes (10,000 of them), scenes:N, or scenes:FIRST-LAST; with :odd at the end, half of them hold an odd object."""
        numbers, _, kind = rest.partition(":")
        first, _, last = numbers.partition("-") if "-" in numbers else ("0", "", numbers or "10000")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)) or kind not in ("", "odd"):
            raise UserError(
                f"data 'scenes:{rest}': give a number of scenes, or FIRST-LAST with FIRST below LAST, and perhaps :odd"
            )
        if min(size) < 16:
            raise UserError(f"data 'scenes:{rest}': scenes are rendered at 16 pixels a side or more, not {size}")
        return cls(int(first), int(last), size, odd=kind == "odd")

    def __len__(self) -> int:
        return self.last - self.first

    def read(self, index: int) -> np.ndarray:
        if self._pixels is None:
            self._pixels = self._cached()
        return np.array(self._pixels[index])

    def read_map(self, task: str, index: int) -> np.ndarray:
        if task == "odd":
            scene, odd = compose_odd(self.seed, self.first + index)
            return (cast(scene, *self.size).owner == (-2 if odd is None else odd)).astype(np.uint8)
        shapes, depths = annotate(compose(self.seed, self.first + index), self.size)
        return shapes if task == "objects" else np.where(depths <= HORIZON, depths, np.float32(0))

    def name(self, index: int) -> str:
        return f"scene {self.first + index}"

    def fingerprint(self, probes: int = 64) -> str:
        return f"scenes-{VERSION}-{self.seed}-{self.first}-{self.last}{'-odd' if self.odd else ''}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}

    def _cached(self) -> np.ndarray:
        """The rendered scenes, from the cache or into it, on all cores."""
        h, w = self.size
        file = cache_folder() / f"{self.fingerprint()}-{h}x{w}.npy"
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}.part")
            try:
                pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(self), h, w, 3))
                for start, block in self._render_all():
                    pixels[start : start + len(block)] = block
                pixels.flush()
                part.rename(file)
            except OSError as error:
                raise UserError(
                    f"cannot write to the cache {file.parent} ({error.strerror}): set OPENJEPA_CACHE"
                ) from error
            finally:
                part.unlink(missing_ok=True)
        return np.load(file, mmap_mode="r")

    def _render_all(self, block: int = 128) -> Iterator[tuple[int, np.ndarray]]:
        edges = [*range(self.first, self.last, block), self.last]
        jobs = [Job(self.seed, a, b, self.size, self.odd) for a, b in pairwise(edges)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        alone = len(jobs) < 4 or cores < 2 or current_process().daemon  # a loader's worker has no workers of its own
        blocks = loaded(Blocks(jobs), 0 if alone else cores, batch_size=None)
        yield from ((job.first - self.first, images.numpy()) for job, images in zip(jobs, blocks, strict=True))


class Blocks(Dataset[Tensor]):
    """Ranges of scenes to render, for the workers of a loader."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(render_range(self.jobs[index]))


def render_range(job: Job) -> np.ndarray:
    """Scenes first to last - 1 of a seed. Returns uint8 [n, height, width, 3]."""
    seed, first, last, size, odd = job
    scenes = (compose_odd(seed, k)[0] if odd else compose(seed, k) for k in range(first, last))
    return np.stack([render(scene, size) for scene in scenes])

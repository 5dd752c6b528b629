"""Who is asked about what: an encoder or a control, with its features of both sets; and the tasks that both sets have."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from openjepa.data.sources import Source
from openjepa.errors import UserError, nearest
from openjepa.evaluate.features import (
    EncoderFeatures,
    Extractor,
    Features,
    PixelFeatures,
    View,
    array_hash,
    short_hash,
    stored,
)
from openjepa.evaluate.patches import PatchFeed
from openjepa.evaluate.views import Maps
from openjepa.models.encoder import Encoder
from openjepa.models.vit import Tokens

LAYERS = 4

Kind = Literal["class", "segmentation", "depth", "none"]


@dataclass(frozen=True)
class Bench:
    """What is measured on, and how."""

    train: Source
    test: Source
    view: View
    patch: int  # pixels, the encoder's
    device: torch.device
    precision: str  # bf16 or fp32
    autocast: Callable[[], AbstractContextManager[Any]]
    tokens: Tokens = "patches"  # that whole images' features are of
    workers: int = 0
    share: tuple[int, int] = (0, 1)  # rank, world size
    seed: int = 0
    fresh: bool = False

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of the images and labels of both sets: what some images hold, and when any of their files changed."""
        both = {"train": self.train, "test": self.test}
        return {name: short_hash([source.fingerprint(), *source.stamps()]) for name, source in both.items()}

    @property
    def grid(self) -> tuple[int, int]:
        return self.view.size[0] // self.patch, self.view.size[1] // self.patch


# ---------------------------------------------------------------- subjects


class Subject:
    """An encoder or the raw pixels, with the features that it has of both sets."""

    def __init__(self, name: str, encoder: Encoder | None, bench: Bench, console: Console) -> None:
        self.name, self.encoder, self.bench, self.console = name, encoder, bench, console
        if encoder:
            encoder.to(bench.device)
            self.extractor: Extractor = EncoderFeatures(
                encoder, bench.view, bench.autocast, bench.precision, LAYERS, bench.tokens
            )
        else:
            self.extractor = PixelFeatures(bench.view, bench.patch, bench.device)

    @cached_property
    def train(self) -> Features:
        return self.features("train", self.bench.train)

    @cached_property
    def test(self) -> Features:
        return self.features("test", self.bench.test)

    def features(self, part: str, source: Source) -> Features:
        """Pooled ones of the last layers."""
        start = time.perf_counter()
        bench = self.bench
        found = stored(self.extractor, source, bench.fingerprints[part], bench.share, bench.workers, bench.fresh)
        seconds = time.perf_counter() - start
        self.console.print(f"{self.name}: features of {len(found)} {part} images in {seconds:.0f} s", highlight=False)
        return found

    def patches(self, task: Task) -> tuple[PatchFeed, PatchFeed]:
        """Of both sets, with the task's answers."""
        b = self.bench
        return (
            PatchFeed(self.extractor, b.train, task.train, b.device, b.autocast, b.seed, b.workers),
            PatchFeed(self.extractor, b.test, task.test, b.device, b.autocast, b.seed, b.workers),
        )

    @cached_property
    def contents(self) -> str:
        """A hash of all images of both sets, by their contents."""
        return array_hash(self.train.hashes, self.test.hashes)

    @cached_property
    def shared_images(self) -> int:
        """Test images whose contents are in the training set, too."""
        return int(np.isin(self.test.hashes, self.train.hashes).sum())


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """One set of answers: classes int64 [n] and [m], the test's in the training set's numbering; or maps."""

    name: str
    classes: list[str]
    train: Tensor | Maps
    test: Tensor | Maps

    @cached_property
    def identity(self) -> str:
        """A hash of its name, its classes, and all answers: of maps some, and when their files changed."""
        both = [a.fingerprint() if isinstance(a, Maps) else array_hash(a.numpy()) for a in (self.train, self.test)]
        return short_hash([self.name, self.classes, *both])

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Those of both sets, of a task with classes."""
        assert isinstance(self.train, Tensor)
        assert isinstance(self.test, Tensor)
        return self.train, self.test


NOTHING = Task("", [], torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def tasks(train: Source, test: Source, kind: Kind, names: Sequence[str] | None = None) -> list[Task]:
    """All tasks of a kind that both sets have, or those of some names.

    Raises UserError if there is none, or for a set of labels whose test classes the training set lacks.
    """
    if kind == "none":
        return [NOTHING]
    found = class_tasks(train, test) if kind == "class" else map_tasks(train, test, kind)
    if names is None:
        return found
    known = {*train.classes, *train.maps}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no task '{unknown[0]}': there are {', '.join(sorted(known))}{nearest(unknown[0], known)}")
    return [task for task in found if task.name in names]


def class_tasks(train: Source, test: Source) -> list[Task]:
    shared = [name for name in train.labels if name in test.labels]
    found = [
        Task(name, train.classes[name], torch.from_numpy(train.labels[name]), matched_labels(train, test, name))
        for name in shared
        if len(train.classes[name]) > 1
    ]
    if not found and shared:
        raise UserError(f"evaluation needs two classes or more: '{train.classes[shared[0]][0]}' is the only one")
    if not found:
        raise UserError("evaluation needs labels in both sets: sub-folders as classes, or a label column")
    return found


def map_tasks(train: Source, test: Source, kind: Kind) -> list[Task]:
    shared = [name for name in train.maps if name in test.maps and (train.maps[name] is None) is (kind == "depth")]
    if not shared:
        need = "depth" if kind == "depth" else "masks"
        raise UserError(f"{kind} needs {need} in both sets: ROOT/images with ROOT/{need} beside it, or scenes")
    for name in shared:
        if train.maps[name] != test.maps[name]:
            raise UserError(f"the sets' masks have other classes: {train.maps[name]} and {test.maps[name]}")
    return [Task(name, train.maps[name] or [], Maps(train, name), Maps(test, name)) for name in shared]


def matched_labels(train: Source, test: Source, task: str) -> Tensor:
    """The test labels in the training set's numbering of classes. int64 [m]."""
    number = {name: i for i, name in enumerate(train.classes[task])}
    missing = [name for name in test.classes[task] if name not in number]
    if missing:
        raise UserError(f"the test set has classes that the training set lacks, such as '{missing[0]}'")
    translate = np.array([number[name] for name in test.classes[task]], dtype=np.int64)
    return torch.from_numpy(translate[test.labels[task]])

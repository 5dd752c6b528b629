"""Views of labelled images, augmented or whole, each with the answer that belongs to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from openjepa.data.augment import NUMBERS, AugmentConfig, random_resized_crop
from openjepa.data.decode import BadImage, Box, decode
from openjepa.data.sources import Source
from openjepa.data.workers import loaded
from openjepa.errors import UserError
from openjepa.evaluate.features import BATCH, Extractor, Images, View
from openjepa.evaluate.linear import Batch, feature_set
from openjepa.rng import Draws, permutation

Kind = Literal["crop", "squash"]
CROP = AugmentConfig(crop_scale=(0.08, 1.0))  # the usual random resized crop of supervised training


class Augmented(Dataset[Tensor]):
    """Item i is the view of the i-th of some images, drawn from the stream of (seed, epoch, image). uint8 [C, H, W].

    crop: random resized crop. squash: the whole image at the view's size. Half of either are flipped.
    """

    def __init__(self, source: Source, indices: np.ndarray, view: View, kind: Kind, seed: int, epoch: int) -> None:
        self.source, self.indices, self.view, self.kind = source, indices, view, kind
        counters = np.uint64(epoch) * np.uint64(2**32) + indices.astype(np.uint64)
        self.numbers = Draws(seed, "evaluation views", counters).uniform(NUMBERS)

    def __len__(self) -> int:
        return len(self.indices)

    def choose(self, i: int) -> Callable[[int, int], Box]:
        """From an image's width and height to the box that the view shows."""
        if self.kind == "squash":
            return lambda width, height: (0, 0, width, height)
        return partial(random_resized_crop, config=CROP, u=self.numbers[i])

    def flips(self, i: int) -> bool:
        return bool(self.numbers[i, -1] < 0.5)

    def __getitem__(self, i: int) -> Tensor:
        index = int(self.indices[i])
        try:
            pixels = decode(self.source.read(index), self.choose(i), self.view.size, self.view.channels)
        except (BadImage, OSError) as error:
            raise UserError(f"unreadable image {self.source.name(index)} ({error}): leave it out") from error
        return torch.from_numpy(np.array(pixels[:, ::-1] if self.flips(i) else pixels)).permute(2, 0, 1)


class Indexed(Protocol):
    """Views of some images of a source. indices: int64 [n], which ones."""

    @property
    def indices(self) -> Sequence[int] | np.ndarray: ...
    def __getitem__(self, i: int) -> Tensor: ...


class Maps:
    """The answers of a dense task: a map of classes or depths for each image of a source."""

    def __init__(self, source: Source, task: str) -> None:
        self.source, self.task = source, task

    def seen(
        self, index: int, choose: Callable[[int, int], Box], size: tuple[int, int], flipped: bool = False
    ) -> Tensor:
        """An image's map through the same view, by the nearest pixel. int64 or float32 [H, W]."""
        whole = Image.fromarray(self.source.read_map(self.task, index))
        box = choose(whole.width, whole.height)
        values = np.asarray(whole.resize((size[1], size[0]), Image.Resampling.NEAREST, box=box))
        found = torch.from_numpy(np.array(values[:, ::-1] if flipped else values))
        return found if found.is_floating_point() else found.long()

    def fingerprint(self, probes: int = 64) -> str:
        """A short hash of some evenly spaced maps, and of when any file of the source changed."""
        count = len(self.source)
        digest = hashlib.blake2b(" ".join(self.source.stamps()).encode(), digest_size=8)
        for index in np.linspace(0, count - 1, min(probes, count)).astype(int):
            digest.update(self.source.read_map(self.task, int(index)).tobytes())
        return digest.hexdigest()


class Answered(Dataset[tuple[Tensor, Tensor]]):
    """Views with the class of each. labels: int64 [images of the source]."""

    def __init__(self, views: Indexed, labels: Tensor) -> None:
        self.views, self.labels = views, labels

    def __len__(self) -> int:
        return len(self.views.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.views[i], self.labels[int(self.views.indices[i])]


class Mapped(Dataset[tuple[Tensor, Tensor]]):
    """Views with the map of each, seen alike."""

    def __init__(self, views: Images | Augmented, maps: Maps) -> None:
        self.views, self.maps = views, maps

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        index, size = int(self.views.indices[i]), self.views.view.size
        return self.views[i], self.maps.seen(index, self.views.choose(i), size, self.views.flips(i))


class ViewFeed:
    """Pooled features of augmented views, made as they are asked for."""

    def __init__(self, extractor: Extractor, source: Source, rows: np.ndarray, labels: Tensor, kind: Kind, seed: int,
                 workers: int) -> None:  # fmt: skip
        self.extractor, self.source, self.rows, self.labels = extractor, source, rows, labels
        self.kind, self.seed, self.workers = kind, seed, workers
        self.shape = extractor(torch.zeros(1, extractor.view.channels, *extractor.view.size, dtype=torch.uint8)).shape

    def __len__(self) -> int:
        return len(self.rows)

    def width(self, name: str) -> int:
        _, layers, d = self.shape
        return int(d if name == "last" else layers * d)

    def batches(self, epoch: int, size: int) -> Iterator[tuple[Batch, Tensor]]:
        order = permutation(self.seed, "probe order", epoch, len(self))
        images = Augmented(self.source, self.rows[order], self.extractor.view, self.kind, self.seed, epoch)
        starts = range(0, len(self) // size * size, size)
        parts = [
            [*range(a, min(a + BATCH, start + size))] for start in starts for a in range(start, start + size, BATCH)
        ]
        loader = loaded(images, self.workers, batch_sampler=parts)
        for start in starts:  # a batch of 16,384 is never in memory as images
            features = torch.cat([self.extractor(next(loader)) for _ in range(start, start + size, BATCH)])
            sets = {name: feature_set(features, name) for name in ("last", "concat4")}
            yield sets, self.labels[order[start : start + size]]

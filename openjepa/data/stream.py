"""From a source to batches: the order of the images, each rank's share, the position after a restart.

Step s of a run is item s of a list; whoever makes it, a worker or the main process, on this start or another, makes
the same. Slot g of the run is the g-th image it trains on; its crop and masks depend on (seed, g) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from openjepa.data.augment import NUMBERS, AugmentConfig, augment
from openjepa.data.decode import BadImage, Raw
from openjepa.data.order import Feistel, epoch_order
from openjepa.data.sources import Source, first_use
from openjepa.data.workers import loaded
from openjepa.errors import UserError, first_line
from openjepa.masking import Masks, TokenMasks
from openjepa.rng import Draws

BAD_IN_A_ROW = 100


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images become batches."""

    batch_size: int = 2048  # images in a step, over all ranks and accumulated parts
    max_bad: float = 0.1  # share of unreadable images at which the run stops
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, images in [0, 1]
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"data.batch_size is {self.batch_size}: it must be at least 1")
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"data.max_bad is {self.max_bad}: a share is between 0 and 1")
        if not self.std or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError("data.mean and data.std need one number a channel, std above 0")


@dataclass(frozen=True)
class Bad:
    """An image that could not be read."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class Views:
    """What is made of every image: a view or several of full size, masks for them, and perhaps small ones.

    masks: from (seed, step, slots of the whole step, those that are made here) to the masks of the latter.
    """

    large: tuple[AugmentConfig, ...]
    size: tuple[int, int]  # height, width in pixels
    channels: int
    masks: Callable[[int, int, np.ndarray, np.ndarray], Masks | TokenMasks]
    small: AugmentConfig | None = None
    smalls: int = 0  # how many
    small_size: tuple[int, int] = (1, 1)

    def kinds(self) -> list[tuple[AugmentConfig, tuple[int, int]]]:
        """How each is made, and its size."""
        small = [(self.small, self.small_size)] * self.smalls if self.small else []
        return [(large, self.size) for large in self.large] + small

    def numbers(self, seed: int, slots: np.ndarray) -> np.ndarray:
        """What the views of every slot are drawn from: [B, views, NUMBERS]."""
        names = ("augment", *(f"augment {i}" for i in range(1, len(self.large) + self.smalls)))
        return np.stack([Draws(seed, name, slots).uniform(NUMBERS) for name in names], 1)

    def make(self, raw: Raw, numbers: np.ndarray) -> list[np.ndarray]:
        """Every view of one image, uint8 [H, W, channels]. Raises BadImage."""
        kinds = zip(self.kinds(), numbers, strict=True)
        return [augment(raw, config, size, self.channels, u) for (config, size), u in kinds]


@dataclass(frozen=True)
class Batch:
    """images: uint8 [B, channels, H, W], or [B, G, channels, H, W] where there are several views; small: [B, L, channels, h, w].

    masks: of the images; indices: of the images, [B]; bad: what was replaced on the way.
    """

    images: Tensor
    masks: Masks | TokenMasks
    indices: np.ndarray
    bad: list[Bad] = field(default_factory=list)
    small: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """From a worker all goes through shared memory: a message of few bytes is written whole or not at all."""
        return unpacked, (self.images, self.masks, torch.from_numpy(self.indices), self.bad, self.small)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True), self.masks.to(device, True))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory, self.masks.pin_memory())

    def parts(self, count: int) -> list[Batch]:
        """Equal parts, for gradient accumulation (on the host)."""
        size = len(self.images) // count
        return [self.rows(slice(i * size, (i + 1) * size)) for i in range(count)]

    def rows(self, cut: slice) -> Batch:
        """Some of the images (on the host)."""
        return replace(self._map(lambda t: t[cut], self.masks.rows(cut)), indices=self.indices[cut], bad=[])

    def _map(self, change: Callable[[Tensor], Tensor], masks: Masks | TokenMasks) -> Batch:
        small = None if self.small is None else change(self.small)
        return replace(self, images=change(self.images), small=small, masks=masks)


def unpacked(images: Tensor, masks: Masks | TokenMasks, indices: Tensor, bad: list[Bad], small: Tensor | None) -> Batch:
    return Batch(images, masks, indices.numpy(), bad, small)


class Steps(Dataset[Batch]):
    """Item s is the batch of step s (this rank's share)."""

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        views: Views,
        seed: int,
        share: np.ndarray | None = None,
    ) -> None:
        """share: which slots of a step are made here, [B]; all unless told."""
        self.source, self.data, self.views, self.seed = source, data, views, seed
        self.per_epoch = steps_per_epoch(len(source), data.batch_size)
        self.share = np.arange(data.batch_size) if share is None else share
        self._epoch, self._order = 0, epoch_order(seed, "order", 0, len(source))

    def order(self, epoch: int) -> np.ndarray | Feistel:
        """The images of an epoch in their order, a permutation keyed by (seed, epoch): see `data.order`."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.seed, "order", epoch, len(self.source))
        return self._order

    def __getitem__(self, step: int) -> Batch:
        return self.batch(step)

    def batch(self, step: int) -> Batch:
        epoch, position = divmod(step, self.per_epoch)
        order = self.order(epoch)
        slots = step * self.data.batch_size + np.arange(self.data.batch_size)
        masks = self.views.masks(self.seed, step, slots, self.share)
        numbers = self.views.numbers(self.seed, slots[self.share])
        places = position * self.data.batch_size + self.share
        bad: list[Bad] = []
        indices = order[places]
        made = [
            self.image(order, int(places[i]), int(indices[i]), read, numbers[i], bad)
            for i, read in enumerate(self.source.reads(indices))
        ]
        large = len(self.views.large)
        images = stacked([views[:large] for views, _ in made])
        small = stacked([views[large:] for views, _ in made]) if self.views.smalls else None
        indices = np.array([index for _, index in made])
        return Batch(images[:, 0] if large == 1 else images, masks, indices, bad, small)

    def image(self, order: np.ndarray | Feistel, place: int, index: int, read: Callable[[], Raw], numbers: np.ndarray,
              bad: list[Bad]) -> tuple[list[np.ndarray], int]:  # fmt: skip
        """The views of the image at a place of the order, or of the next good one after it, and its index.

        index, read: of the image at the place.
        """
        tries = min(BAD_IN_A_ROW, len(order))
        for k in range(1, tries + 1):
            try:
                raw = read() if k == 1 else self.source.read(index)
                return self.views.make(raw, numbers), index
            except (BadImage, FileNotFoundError, PermissionError) as error:
                bad.append(Bad(index, self.source.name(index), first_line(error)))
            except OSError as error:  # the disk or the network, not the image
                raise UserError(f"cannot read {self.source.name(index)}: {first_line(error)}") from error
            index = int(order[(place + k) % len(order)])
        raise UserError(f"{tries} images in a row cannot be read, the last {bad[-1].name}: {bad[-1].reason}")


def stacked(views: list[list[np.ndarray]]) -> Tensor:
    """Every image's views, [H, W, channels] each, as one tensor [B, views, channels, H, W]."""
    height, width, channels = views[0][0].shape
    out = np.empty((len(views), len(views[0]), channels, height, width), np.uint8)
    for row, each in zip(out, views, strict=True):
        for place, view in zip(row, each, strict=True):
            place[:] = view.transpose(2, 0, 1)
    return torch.from_numpy(out)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch. Raises UserError when there is not one."""
    if images < batch_size:
        raise UserError(f"data.batch_size {batch_size} is larger than the data set of {images} images: lower it")
    return images // batch_size


def share(batch_size: int, parts: int, rank: int, ranks: int) -> np.ndarray:
    """The slots of a step that one rank makes, int64 [batch_size / ranks]: of every accumulated part, its share.

    So the parts, and with them the sums of a step, hold the same images on any number of ranks. Raises UserError.
    """
    if batch_size % (parts * ranks):
        raise UserError(
            f"data.batch_size {batch_size} is not divisible by {ranks} processes x optim.accumulate {parts}: "
            f"the next that is is {-(-batch_size // (parts * ranks)) * parts * ranks}"
        )
    return np.arange(batch_size).reshape(parts, ranks, -1)[:, rank].ravel()


def batches(
    steps: Steps, start: int, end: int, workers: int, pin: bool, read_mb_s: float | None = None
) -> Iterator[Batch]:
    """The batches of steps start to end - 1, in order. read_mb_s: what each worker may read from a store.

    Raises the UserError that making one met, or that a worker died.
    """
    if workers:
        first_use(steps.source)
    yield from loaded(
        steps,
        workers,
        read_mb_s=read_mb_s,
        sampler=range(start, end),
        batch_size=None,
        prefetch_factor=2 if workers else None,
        pin_memory=pin,
    )

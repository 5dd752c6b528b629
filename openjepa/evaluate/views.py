"""Augmented views of labelled images: for probes that learn with the frozen encoder in the loop, and for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openjepa.data.augment import NUMBERS, AugmentConfig, augment
from openjepa.data.decode import BadImage, decode
from openjepa.data.sources import Source
from openjepa.errors import UserError
from openjepa.evaluate.features import BATCH, Extractor, View
from openjepa.evaluate.linear import Batch, feature_set
from openjepa.rng import Draws, permutation

Kind = Literal["crop", "squash"]
CROP = AugmentConfig(crop_scale=(0.08, 1.0), flip=0.5)  # the usual random resized crop and flip of supervised training


class Augmented(Dataset[Tensor]):
    """Item i is the view of the i-th of some rows, drawn from the stream of (seed, epoch, row). uint8 [C, H, W].

    crop: random resized crop and flip. squash: the whole image at the view's size, flipped or not.
    """

    def __init__(self, source: Source, rows: np.ndarray, view: View, kind: Kind, seed: int, epoch: int) -> None:
        self.source, self.rows, self.view, self.kind = source, rows, view, kind
        counters = np.uint64(epoch) * np.uint64(2**32) + rows.astype(np.uint64)
        self.numbers = Draws(seed, "evaluation views", counters).uniform(NUMBERS)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        index, numbers = int(self.rows[i]), self.numbers[i]
        try:
            raw = self.source.read(index)
            if self.kind == "crop":
                pixels = augment(raw, CROP, self.view.size, self.view.channels, numbers)
            else:
                pixels = decode(raw, lambda w, h: (0, 0, w, h), self.view.size, self.view.channels)
                pixels = pixels[:, ::-1] if numbers[0] < 0.5 else pixels
        except (BadImage, OSError) as error:
            raise UserError(f"unreadable image {self.source.name(index)} ({error}): remove it to evaluate") from error
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def batches(images: Dataset[Tensor], labels: Tensor, size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches in order, with their labels: uint8 [B, C, H, W], int64 [B]."""
    loader = DataLoader(images, batch_size=size, num_workers=workers, drop_last=True)
    yield from zip(loader, labels.split(size), strict=False)


class ViewFeed:
    """Features of augmented views, made as they are asked for."""

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
        for batch, labels in batches(images, self.labels[order], size, self.workers):
            features = torch.cat([self.extractor(part) for part in batch.split(BATCH)])
            yield {name: feature_set(features, name) for name in ("last", "concat4")}, labels

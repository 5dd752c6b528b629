"""Surprise of a run: an energy for each patch, beside those of a reference set, which are computed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openjepa.data.decode import PIXELS_VERSION, BadImage, Box
from openjepa.data.sources import Source, cache_folder
from openjepa.data.workers import loaded
from openjepa.engine.device import Precision, pick_autocast, pick_device, pick_precision
from openjepa.errors import UserError
from openjepa.evaluate.features import Hashed, Images, View, short_hash
from openjepa.evaluate.surprise import Remains, Surprise, Usual, score, usual_block
from openjepa.masking import Grid
from openjepa.methods.ijepa import IJEPA
from openjepa.recipes.exchange import Trained
from openjepa.rng import permutation

BATCH = 16  # images whose energies are computed together
REFERENCE = 1000  # images that statistics are of, at most
VERSION = 3  # of what the cache holds


@dataclass(frozen=True)
class PatchView(View):
    """A view of images that hold one patch at least."""

    patch: int = 1

    def box(self, width: int, height: int) -> Box:
        if min(width, height) < self.patch:
            raise BadImage(f"{width}x{height} pixels are smaller than a patch of {self.patch}")
        return super().box(width, height)


@dataclass(frozen=True)
class Judge:
    """A run's surprise, and what of it is usual."""

    surprise: Surprise
    usual: Usual

    def __call__(self, images: Tensor) -> Judged:
        """images: uint8 [B, channels, H, W], a batch."""
        energies, remains = self.surprise(images)
        unusual = self.usual(remains).reshape(energies.shape)
        return Judged(energies.numpy(), unusual, score(unusual))


class Judged(NamedTuple):
    """energies: the run's own loss; unusual: 1 on average over the reference; both [B, rows, columns]. scores: [B]."""

    energies: np.ndarray
    unusual: np.ndarray
    scores: np.ndarray


def surprise_of(trained: Trained, block: Grid | None = None, stride: int = 1, precision: Precision | None = None,
                device: str = "auto") -> Surprise:  # fmt: skip
    """A run's energy, ready to be called. Raises UserError for a run of a method that predicts no representations."""
    recipe = trained.recipe
    if refusal := without_predictor(trained):
        raise UserError(refusal)
    assert isinstance(trained.method, IJEPA)
    where = pick_device(device)
    block = block or usual_block(recipe.model.grid, recipe.masking.target_scale)
    autocast = pick_autocast(pick_precision(precision or recipe.precision, where), where)
    return Surprise(trained.method.to(where), trained.normalise.to(where), autocast, block, stride)


def without_predictor(trained: Trained) -> str | None:
    """Why a run has no surprise, if it has none."""
    if isinstance(trained.method, IJEPA):
        return None
    return f"{trained.run} is a run of {trained.recipe.method}: surprise needs a predictor of representations, which I-JEPA has"


def view_of(trained: Trained, source: Source | None = None, share: float = 1.0, squash: bool = False) -> PatchView:
    """How images are seen: the shorter side resized and the centre cropped, or whole where the source or the user wants it."""
    model = trained.recipe.model
    squash = squash or (source is not None and source.whole)
    return PatchView(model.image_size, model.channels, 1.0 if squash else share, squash, model.patch_size)


def judge_of(surprise: Surprise, trained: Trained, source: Source, view: View, most: int = REFERENCE) -> Judge:
    """A run's surprise beside that of a reference set, which is computed once and kept in the cache.

    most: images of the reference that count, a fixed random choice.
    """
    about = [
        VERSION, trained.fingerprint(), source.fingerprint(), source.stamps(), asdict(view), surprise.identity,
        PIXELS_VERSION, min(most, len(source)),
    ]  # fmt: skip
    file = cache_folder() / "surprise" / f"{short_hash(about)}.npz"
    if not file.exists():
        found = usual_of(surprise.remains, reference_images(source, view, most))
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part.npz")
        np.savez(part, mean=found.mean, whitening=found.whitening, scores=found.scores, images=found.images)
        part.rename(file)
    with np.load(file) as kept:
        mean, whitening = (torch.from_numpy(kept[name]) for name in ("mean", "whitening"))
        return Judge(surprise, Usual(mean, whitening, kept["scores"], int(kept["images"])))


def usual_of(remains: Remains, images: Images, workers: int = 0) -> Usual:
    """Of those that can be read. Raises UserError for too few."""
    return Usual.of(remains(batch) for batch in batches(images, workers))


def reference_images(source: Source, view: View, most: int = REFERENCE) -> Images:
    """Those that statistics are of: all, or a fixed random choice."""
    chosen = np.sort(permutation(0, "surprise reference", 0, len(source))[:most])
    return Images(source, chosen, view, skip_bad=True)


def batches(images: Images, workers: int = 0, unread: list[int] | None = None) -> Iterator[Tensor]:
    """Of those that can be read. unread: gets the places of the others."""
    place = 0
    for batch, hashes in loaded(Hashed(images), workers, batch_size=BATCH):
        good = hashes != 0
        if unread is not None:
            unread += (place + (~good).nonzero()[:, 0]).tolist()
        place += len(good)
        if good.any():
            yield batch[good]

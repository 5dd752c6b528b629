"""What a score and a map are worth at finding what is unusual: AUROC of images, AUROC and overlap of pixels, the first guess.

All intervals resample images. n images of P pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from openjepa.evaluate.scores import IGNORED, Answer, resampled

LEVELS = 500  # thresholds that maps are read at, quantiles of their own values
SAMPLED = 2_000_000  # pixels that tell the quantiles
MOST_FALSE = 0.3  # of the usual pixels: where the overlap's curve ends, as is usual


def image_auroc(scores: np.ndarray, odd: np.ndarray) -> Answer:
    """The chance that an unusual image scores above a usual one; ties count half. scores: [n], odd: bool [n]."""
    values, place = np.unique(scores, return_inverse=True)

    def value(counts: np.ndarray) -> float:
        high, low = (np.bincount(place, counts * kind, len(values)) for kind in (odd, ~odd))
        return auroc(high, low)

    return Answer("image AUROC", value(np.ones(len(odd))), resampled(len(odd), value), details={"odd": int(odd.sum())})


def auroc(high: np.ndarray, low: np.ndarray) -> float:
    """From how many of either kind have each value, in rising order; nan where there is none of one kind."""
    below = np.cumsum(low) - low
    total = high.sum() * low.sum()
    return float((high * (below + low / 2)).sum() / total) if total else float("nan")


@dataclass
class Levels:
    """How many pixels of each image lie at each level of the maps: all that pixel scores need, whatever the size.

    Fill it image by image with `add`.
    """

    edges: np.ndarray  # float [LEVELS - 1]

    def __post_init__(self) -> None:
        self.odd: list[np.ndarray] = []
        self.usual: list[np.ndarray] = []
        self.overlaps: list[np.ndarray] = []  # of each image, the sum over its regions of the share at each level
        self.regions: list[int] = []
        self.hits: list[bool] = []  # of images with something unusual: whether the highest pixel is in it

    @classmethod
    def of(cls, maps: np.ndarray) -> Levels:
        """Levels for maps of any size: quantiles of their values."""
        values = maps.ravel()[:: max(1, maps.size // SAMPLED)]
        return cls(np.unique(np.quantile(values, np.linspace(0, 1, LEVELS + 1)[1:-1])))

    def add(self, found: np.ndarray, mask: np.ndarray) -> None:
        """One image. found: float [H, W]; mask: [H, W], 0 usual, 255 not counted, else unusual."""
        level = np.searchsorted(self.edges, found, side="right")
        counted, odd = mask != IGNORED, (mask != 0) & (mask != IGNORED)
        size = len(self.edges) + 1
        self.odd.append(np.bincount(level[odd], minlength=size))
        self.usual.append(np.bincount(level[counted & ~odd], minlength=size))
        labelled, count = ndimage.label(odd, structure=np.ones((3, 3)))
        shares = np.zeros(size)
        for region in range(1, count + 1):
            inside = np.bincount(level[labelled == region], minlength=size)
            shares += inside / inside.sum()
        self.overlaps.append(shares)
        self.regions.append(count)
        if count:
            self.hits.append(bool(odd[np.unravel_index(np.where(counted, found, -np.inf).argmax(), found.shape)]))

    def answers(self) -> list[Answer]:
        """Pixel AUROC, per-region overlap (PRO: Bergmann et al., 2020) and the share of first guesses that are right."""
        odd, usual, overlaps = (np.array(part, dtype=np.float64) for part in (self.odd, self.usual, self.overlaps))
        regions, hits = np.array(self.regions, dtype=np.float64), np.array(self.hits, dtype=np.float64)
        n = len(odd)

        def pixels(counts: np.ndarray) -> float:
            return auroc(counts @ odd, counts @ usual)

        def overlap(counts: np.ndarray) -> float:
            return pro(counts @ overlaps, float(counts @ regions), counts @ usual)

        def first(counts: np.ndarray) -> float:
            return float(counts @ hits / counts.sum())

        found = [
            Answer("pixel AUROC", pixels(np.ones(n)), resampled(n, pixels)),
            Answer("PRO", overlap(np.ones(n)), resampled(n, overlap), details={"regions": int(regions.sum())}),
        ]
        if len(hits):
            found.append(Answer("first guess", first(np.ones(len(hits))), resampled(len(hits), first)))
        return found


def pro(overlaps: np.ndarray, regions: float, usual: np.ndarray) -> float:
    """The area under regions' mean overlap against the share of usual pixels that are taken, up to MOST_FALSE of them.

    overlaps, usual: [levels] in rising order. 1 at best; chance gives MOST_FALSE / 2.
    """
    if not regions or not usual.sum():
        return float("nan")
    false = np.concatenate([[0], usual[::-1].cumsum() / usual.sum()])  # from the highest level down
    right = np.concatenate([[0], overlaps[::-1].cumsum() / regions])
    ends = np.append(false[false < MOST_FALSE], MOST_FALSE)
    return float(np.trapezoid(np.interp(ends, false, right), ends) / MOST_FALSE)


def records(answers: Sequence[Answer], of: str, task: str) -> list[dict[str, Any]]:
    """Answers as JSON and tables have them."""
    return [
        {"of": of, "task": task, "protocol": "surprise", "metric": a.metric, "value": a.value, "interval": a.interval,
         "spread": a.spread, "details": a.details}
        for a in answers
    ]  # fmt: skip

"""Which of many features are alike, and which are like none: by cosine, once what all of them share is taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

TILE = 4096  # rows and columns of a block of pairs: 64 MB of similarities
MOST, EACH, FEWEST = 512, 10, 8  # directions that are kept, rows that each needs, and fewer than are worth scaling
FLAT = 1e-6  # variance of a direction, beside the largest, that is rounding
FIT = 50_000  # rows that directions are found from


@dataclass(frozen=True)
class Whitening:
    """Features less their mean, every direction scaled to the same variance.

    Pooled features of images lie close together, and differ mostly in a few directions, brightness for one: without this any two
    have a cosine near 1. Of fewer than 80 rows directions are scaled by what they vary and what all do on average: seven images
    whose directions all varied alike would all be as far apart.
    mean: float32 [places, D], a mean for each place of a patch in the grid, as features tell the place, too; of whole images there
    is one. directions: float32 [D, d].
    """

    mean: np.ndarray
    directions: np.ndarray

    def __call__(self, features: np.ndarray, places: np.ndarray | int = 0) -> np.ndarray:
        """[n, D] to float32 [n, d]. places: int [n]."""
        return (features.astype(np.float32) - self.mean[places]) @ self.directions


def whitening(
    batches: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]], rows: int, places: int, dim: int
) -> Whitening:
    """Of features [n, D] and their places, int [n], batch by batch; they are gone through twice."""
    total, count = np.zeros((places, dim)), np.zeros(places)
    for features, place in batches():
        np.add.at(count, place, 1)
        for at in np.unique(place):
            total[at] += features[place == at].sum(0, dtype=np.float64)
    mean = (total / np.maximum(count, 1)[:, None]).astype(np.float32)
    covariance, step, used = (
        np.zeros((dim, dim)),
        max(1, rows // FIT) | 1,
        0,
    )  # odd: of a grid's places it leaves out none
    for features, place in batches():
        centred = (features[::step].astype(np.float32) - mean[place[::step]]).astype(np.float64)
        covariance += centred.T @ centred
        used += len(centred)
    variances, axes = np.linalg.eigh(covariance / used)
    variances, axes = variances[::-1], axes[:, ::-1]
    length = float((mean.astype(np.float64) ** 2).sum(1).mean())
    if variances[0] <= FLAT * length:  # one image, or copies of one
        return Whitening(np.zeros_like(mean), np.eye(dim, dtype=np.float32)[:, :MOST])
    told = min(MOST, int((variances > FLAT * variances[0]).sum()))  # directions in which rows differ
    kept = min(told, rows // EACH)
    if kept < FEWEST:  # too few rows to know how directions vary: all are kept, and the flatter ones count less
        return Whitening(
            mean, (axes[:, :told] / np.sqrt(variances[:told] + variances[:told].mean())).astype(np.float32)
        )
    return Whitening(mean, (axes[:, :kept] / np.sqrt(variances[:kept])).astype(np.float32))


def near_pairs(features: Tensor, above: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs i < j whose cosine is at least `above`. features: [n, D]. Yields int64 [m] and [m], block by block."""
    units = F.normalize(features, dim=1)
    for first in range(0, len(units), TILE):
        rows = units[first : first + TILE]
        for second in range(first, len(units), TILE):
            alike = rows @ units[second : second + TILE].T >= above
            i, j = alike.triu(1).nonzero().T if first == second else alike.nonzero().T
            if len(i):
                yield (i + first).cpu().numpy(), (j + second).cpu().numpy()


def groups(count: int, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """What pairs tie together, directly or by others, of two or more; the largest first. count: of all that could be."""
    group = np.arange(count)
    for i, j in pairs:
        ties = coo_array((np.ones(len(i), dtype=bool), (group[i], group[j])), shape=(count, count))
        group = connected_components(ties, directed=False)[1][group]
    order = np.argsort(group, kind="stable")
    cuts = np.flatnonzero(np.diff(group[order])) + 1
    return sorted(
        (found for found in np.split(order, cuts) if len(found) > 1), key=lambda found: (-len(found), found[0])
    )


def kth_similarity(features: Tensor, k: int) -> Tensor:
    """Of each the cosine with its k-th nearest other. features: [n, D], k below n. Returns [n] on the CPU."""
    units = F.normalize(features, dim=1)
    found = []
    for first in range(0, len(units), TILE):
        rows = units[first : first + TILE]
        best = rows.new_empty(len(rows), 0)
        for second in range(0, len(units), TILE):
            alike = rows @ units[second : second + TILE].T
            if first == second:
                alike.fill_diagonal_(-torch.inf)  # itself
            best = torch.cat([best, alike.topk(min(k, alike.shape[1]), dim=1).values], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        found.append(best[:, -1].cpu())
    return torch.cat(found)


def similarities(features: Tensor, to: int, of: Sequence[int]) -> list[float]:
    """Cosines of one with some others."""
    return F.cosine_similarity(features[to][None], features[list(of)], dim=1).tolist()

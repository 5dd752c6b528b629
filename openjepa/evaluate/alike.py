"""Which of many features are alike, and which are like none: all pairs by cosine, a block of them at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

TILE = 4096  # rows and columns of a block of pairs: 64 MB of similarities


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

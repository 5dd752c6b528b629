"""Weighted k-nearest-neighbour classification (Wu et al., 2018), as DINO and iBOT report it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openjepa.errors import UserError

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Numbers of neighbours, and the temperature of their votes. Those above the training set's size are left out."""

    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or self.temperature <= 0:
            raise UserError("knn: ks are 1 or more, temperature is above 0")


QUERIES, BANK = 1024, 65536  # compared at a time: 0.3 GB of similarities, however large the sets


@torch.no_grad()
def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, ks: Sequence[int] = KS,
                temperature: float = TEMPERATURE, device: torch.device | str = "cpu") -> dict[int, Tensor]:  # fmt: skip
    """Each neighbour votes with exp(cosine / temperature).

    bank [n, D], labels int64 [n], queries [m, D]. Returns, for each k that the bank has, int64 [m] predictions.
    """
    ks = [k for k in ks if k <= len(bank)] or [len(bank)]
    labels = labels.to(device)
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in queries.split(QUERIES):
        similarity, index = nearest(bank, part.to(device), max(ks))
        weights, voted = (similarity / temperature).exp(), labels[index]  # [m, k]
        for k in ks:
            votes = weights.new_zeros(len(part), classes).scatter_add(1, voted[:, :k], weights[:, :k])
            parts[k].append(votes.argmax(-1).cpu())
    return {k: torch.cat(predictions) for k, predictions in parts.items()}


def nearest(bank: Tensor, queries: Tensor, k: int, metric: Literal["cosine", "l2"] = "cosine") -> tuple[Tensor, Tensor]:
    """The k vectors nearest to each query, over a bank too large to compare with at once.

    bank [n, D], queries [m, D]. Returns similarities (cosines, or negative squared distances), float32 [m, k], and whose they
    are, int64 [m, k], the nearest first.
    """

    def prepared(x: Tensor) -> Tensor:
        x = x.to(queries.device).float()
        return F.normalize(x, dim=-1) if metric == "cosine" else x

    ours = prepared(queries)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(bank), BANK):
        part = prepared(bank[start : start + BANK])
        similarities = ours @ part.T
        if metric == "l2":
            similarities = 2 * similarities - part.square().sum(-1) - ours.square().sum(-1, keepdim=True)
        similarity, index = similarities.topk(min(k, len(part)), dim=-1)
        index = index + start
        if best is not None:
            joined = torch.cat([best[0], similarity], dim=1)
            similarity, order = joined.topk(min(k, joined.shape[1]), dim=-1)
            index = torch.cat([best[1], index], dim=1).gather(1, order)
        best = similarity, index
    assert best is not None
    return best

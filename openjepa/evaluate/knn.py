"""Weighted k-nearest-neighbour classification (Wu et al., 2018), as DINO and iBOT report it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KS = (10, 20, 100, 200)


@torch.no_grad()
def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, ks: Sequence[int] = KS,
                temperature: float = 0.07, chunk: int = 1024) -> dict[int, Tensor]:  # fmt: skip
    """Each neighbour votes with exp(cosine / temperature).

    bank [n, D], labels int64 [n], queries [m, D]. Returns, for each k that the bank has, int64 [m] predictions.
    """
    ks = [k for k in ks if k <= len(bank)] or [len(bank)]
    bank, queries = F.normalize(bank.float(), dim=-1), F.normalize(queries.float(), dim=-1)
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in queries.split(chunk):
        similarity, index = (part @ bank.T).topk(max(ks), dim=-1)
        weights, voted = (similarity / temperature).exp(), labels[index]  # [m, k]
        for k in ks:
            votes = weights.new_zeros(len(part), classes).scatter_add(1, voted[:, :k], weights[:, :k])
            parts[k].append(votes.argmax(-1))
    return {k: torch.cat(predictions) for k, predictions in parts.items()}

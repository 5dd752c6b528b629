"""Attentive probe: one cross-attention block asks the frozen patches, then a linear layer (CAPI; V-JEPA)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openjepa.evaluate.linear import split
from openjepa.evaluate.patches import PatchFeed, SweepConfig, outputs, train
from openjepa.evaluate.views import Kind

HEAD = 64  # channels of an attention head


@dataclass(frozen=True, kw_only=True)
class AttentiveConfig(SweepConfig):
    """CAPI's probe (Protocols, F.2), with fewer rates and steps."""

    name: ClassVar[str] = "attentive"

    lrs: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    decays: tuple[float, ...] = (5e-4, 0.05)
    betas: tuple[float, float] = (0.9, 0.95)
    per_256: bool = True
    batch_size: int = 128
    min_steps: int = 500
    warmup: float = 0.1
    views: Kind = "crop"


class AttentivePool(nn.Module):
    """A learned query attends to patches [B, N, D], heads of 64 channels; a linear layer makes class scores [B, C]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.heads = width // HEAD if width % HEAD == 0 else 1
        self.query = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)
        self.kv = nn.Linear(width, 2 * width)
        self.classify = nn.Linear(width, classes)
        for layer in (self.kv, self.classify):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, patches: Tensor) -> Tensor:
        b, n, _ = patches.shape
        k, v = self.kv(self.norm(patches)).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        q = self.query.view(1, self.heads, 1, -1).expand(b, -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q.to(k.dtype), k, v).flatten(1)
        scores: Tensor = self.classify(pooled)
        return scores


@dataclass(frozen=True)
class AttentiveResult:
    """predictions: of the chosen probe on the test set, int64 [m]; sweep: lr, weight decay, validation accuracy."""

    predictions: Tensor
    chosen: dict[str, float]
    sweep: list[dict[str, float]]


def attentive_probe(config: AttentiveConfig, data: PatchFeed, test: PatchFeed, classes: int) -> AttentiveResult:
    """Train all probes, choose on held-out training images, predict the test set once."""
    fitting, validation = split(len(data), config.validation, data.seed)
    probes = train(partial(AttentivePool, classes=classes), config, data, fitting,
                   lambda scores, labels, _: F.cross_entropy(scores, labels))  # fmt: skip
    right = torch.zeros(len(probes))
    for found, labels in outputs(probes, data, validation):
        right += torch.stack([(scores.argmax(-1) == labels).sum() for scores in found]).cpu()
    shares = (right / len(validation)).tolist()
    sweep = [
        {"lr": lr, "weight_decay": decay, "validation_accuracy": share}
        for (lr, decay), share in zip(config.settings, shares, strict=True)
    ]
    best = int(np.argmax(shares))
    seen = outputs([probes[best]], test, np.arange(len(test)))
    return AttentiveResult(torch.cat([found[0].argmax(-1).cpu() for found, _ in seen]), sweep[best], sweep)

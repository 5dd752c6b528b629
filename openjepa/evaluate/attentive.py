"""Attentive probe: one cross-attention block asks the frozen patches, then a linear layer (CAPI; V-JEPA).

A learned query attends to the patches of the last layer, heads of 64 channels; several learning rates and weight decays are
trained side by side on the same features, and the best is chosen on a held-out part of the training set.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openjepa.data.sources import Source
from openjepa.errors import UserError
from openjepa.evaluate.features import BATCH, EncoderFeatures, Images
from openjepa.evaluate.linear import split
from openjepa.evaluate.views import Augmented, batches
from openjepa.rng import key, permutation

HEAD = 64  # channels of an attention head


@dataclass(frozen=True, kw_only=True)
class AttentiveConfig:
    """CAPI's probe (Protocols, F.2). lrs: for 256 images in a batch; AdamW, betas 0.9 and 0.95, a cosine after a warm-up."""

    lrs: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    decays: tuple[float, ...] = (5e-4, 0.05)
    batch_size: int = 128
    epochs: int = 10
    min_steps: int = 500
    warmup: float = 0.1  # share of the steps
    views: Literal["crop", "squash"] = "crop"
    validation: float = 0.1

    def __post_init__(self) -> None:
        if not self.lrs or not self.decays or min(self.lrs) <= 0 or self.batch_size < 1 or self.epochs < 1:
            raise UserError("attentive: lrs and decays need one value at least; lrs, batch_size and epochs are above 0")
        if not 0 < self.validation < 1 or not 0 <= self.warmup < 1:
            raise UserError("attentive: validation is between 0 and 1, warmup from 0 to below 1")


class AttentivePool(nn.Module):
    """Patches [B, N, D] to class scores [B, C]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
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


def attentive_probe(config: AttentiveConfig, extractor: EncoderFeatures, train: Source, labels: Tensor, test: Source,
                    classes: int, seed: int, workers: int = 0) -> AttentiveResult:  # fmt: skip
    """Train all probes with the frozen encoder in the loop, choose, predict the test set once."""
    width = extractor.encoder.vit.config.dim
    device = extractor.encoder.vit.patch_embed.proj.weight.device
    if width % max(1, width // HEAD):
        raise UserError(f"the attentive probe needs a width that is a multiple of {HEAD}: this encoder's is {width}")
    fitting, validation = split(len(train), config.validation, seed)
    settings = list(itertools.product(config.lrs, config.decays))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "attentive probe") >> 1)
        first = AttentivePool(width, classes)
    probes = [AttentivePool(width, classes).to(device) for _ in settings]
    for probe in probes:
        probe.load_state_dict(first.state_dict())
    size = min(config.batch_size, len(fitting))
    groups = [{"params": [*p.parameters()], "lr": lr * size / 256, "weight_decay": decay}
              for p, (lr, decay) in zip(probes, settings, strict=True)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    peaks = [group["lr"] for group in optimizer.param_groups]
    per_epoch = len(fitting) // size
    epochs = max(config.epochs, math.ceil(config.min_steps / per_epoch))
    steps, step = epochs * per_epoch, 0
    for epoch in range(epochs):
        rows = fitting[permutation(seed, "probe order", epoch, len(fitting))]
        images = Augmented(train, rows, extractor.view, config.views, seed, epoch)
        for batch, target in batches(images, labels[rows], size, workers):
            rise = (step + 1) / max(1, config.warmup * steps)
            factor = min(rise, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            patches, target = patch_features(extractor, batch), target.to(device)
            with extractor.autocast():
                losses = [F.cross_entropy(probe(patches), target) for probe in probes]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            step += 1
    right = torch.zeros(len(probes))
    for at, predicted in predictions(probes, extractor, train, validation, workers):
        right += (predicted == labels[validation[at]][:, None]).sum(0)
    scores = (right / len(validation)).tolist()
    sweep = [
        {"lr": lr, "weight_decay": decay, "validation_accuracy": score}
        for (lr, decay), score in zip(settings, scores, strict=True)
    ]
    best = int(np.argmax(scores))
    chosen = [part[:, 0] for _, part in predictions([probes[best]], extractor, test, np.arange(len(test)), workers)]
    return AttentiveResult(torch.cat(chosen), sweep[best], sweep)


@torch.no_grad()
def patch_features(extractor: EncoderFeatures, batch: Tensor) -> Tensor:
    """The last layer's patches, after the final norm, on the encoder's device. float32 [B, N, D]."""
    with extractor.autocast():
        device = extractor.encoder.vit.patch_embed.proj.weight.device
        return extractor.encoder(batch.to(device)).float()


@torch.no_grad()
def predictions(probes: list[AttentivePool], extractor: EncoderFeatures, source: Source, rows: np.ndarray,
                workers: int) -> list[tuple[slice, Tensor]]:  # fmt: skip
    """Each probe's class for whole images: slices of `rows`, int64 [B, probes]."""
    loader = torch.utils.data.DataLoader(Images(source, rows, extractor.view), batch_size=BATCH, num_workers=workers)
    found, at = [], 0
    for batch in loader:
        patches = patch_features(extractor, batch)
        found.append((slice(at, at + len(batch)), torch.stack([p(patches).argmax(-1) for p in probes], 1).cpu()))
        at += len(batch)
    return found

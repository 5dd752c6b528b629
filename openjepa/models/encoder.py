"""A trained encoder ready for use: it normalises images itself and returns features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openjepa.models.vit import ViT


class Normalise(nn.Module):
    """uint8 [B, C, H, W], or float in [0, 1], to what the network was trained on."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return (images - self.get_buffer("mean")) / self.get_buffer("std")


class Encoder(nn.Module):
    """One of a run's networks with its normalisation. `network` says which one it is."""

    def __init__(self, vit: ViT, normalise: Normalise, network: str) -> None:
        super().__init__()
        self.vit, self.normalise, self.network = vit, normalise, network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 or float in [0, 1], [B, C, H, W], sides divisible by the patch. Returns [B, N, D]."""
        patches: Tensor = self.vit(self.normalise(images))
        return patches

    @torch.no_grad()
    def features(self, images: Tensor, layers: int = 1) -> Tensor:
        """Average-pooled features of the last `layers` blocks, concatenated. Returns [B, layers * D]."""
        outputs = self.vit.intermediate(self.normalise(images), layers)
        return torch.cat([o.mean(1) for o in outputs], dim=-1)

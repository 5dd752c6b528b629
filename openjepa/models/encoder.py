"""A trained encoder ready for use: it normalises images itself and returns features."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from openjepa.models.vit import Tokens, ViT


class Normalise(nn.Module):
    """uint8 [B, C, H, W], or float in [0, 1], to what the network was trained on."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.statistics = tuple(mean), tuple(std)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for what is no batch of images with the channels that the network knows."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        if not isinstance(images, Tensor):
            raise ValueError(f"images are a {type(images).__name__}: give a tensor [B, {len(mean)}, H, W]")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images of type {images.dtype}: give uint8 from 0 to 255, or floating point from 0 to 1")
        if images.ndim != 4 or images.shape[1] != len(mean):
            raise ValueError(
                f"images of shape {list(images.shape)}: give [batch, channels, height, width], {len(mean)} channels"
            )
        scale = 255 if images.dtype == torch.uint8 else 1
        return (images.to(mean.dtype) / scale - mean) / std


class Encoder(nn.Module):
    """One of a run's networks with its normalisation. `network` says which one it is.

    A fine-tuned one has a head: it tells `classes` apart.
    """

    def __init__(self, vit: ViT, normalise: Normalise, network: str, head: nn.Linear | None = None,
                 classes: Sequence[str] = ()) -> None:  # fmt: skip
        super().__init__()
        self.vit, self.normalise, self.network = vit, normalise, network
        self.head, self.classes = head, list(classes)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 or float in [0, 1], [B, C, H, W], sides divisible by the patch. Returns [B, N, D]."""
        patches: Tensor = self.vit(self.normalise(images))
        return patches

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Scores of the classes, before any softmax, [B, classes]. images: as for a call.

        Raises ValueError for an encoder that was not fine-tuned.
        """
        if self.head is None:
            raise ValueError(f"this {self.network} has no head: openjepa finetune makes classifiers")
        scores: Tensor = self.head(self(images).mean(1))
        return scores

    @torch.no_grad()
    def features(self, images: Tensor, layers: int = 4, pool: Literal["mean", "none", "class"] = "mean") -> Tensor:
        """The last `layers` blocks' outputs, each after the final norm, concatenated (appendix A, linear evaluation).

        images: as for a call. pool: mean gives one vector an image, [B, layers * D], the last block's last; none keeps
        the patches, [B, N, layers * D]; class takes the class token, [B, layers * D], as MAE's and iBOT's authors do.
        Raises ValueError for anything else, and where there is no class token.
        """
        if layers < 1 or pool not in ("mean", "none", "class"):
            raise ValueError(f"layers {layers}, pool '{pool}': at least one layer, and a pool of mean, none or class")
        if pool == "class" and not self.vit.config.class_token:
            raise ValueError("pool 'class': this encoder has no class token")
        tokens: Tokens = "class" if pool == "class" else "patches"
        outputs = self.vit.intermediate(self.normalise(images), self.vit.last(layers), tokens)
        return torch.cat([o if pool == "none" else o.mean(1) for o in outputs], dim=-1)

    @torch.no_grad()
    def intermediate(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Feature maps for dense heads: the outputs of some blocks, each after the final norm.

        layers: block numbers from 0, or from -1 at the end. Returns for each [B, D, H / patch, W / patch].
        """
        if isinstance(layers, int):
            raise ValueError(f"layers {layers}: give a list, such as [{layers}]")
        grid = [side // self.vit.config.patch_size for side in images.shape[-2:]]
        outputs = self.vit.intermediate(self.normalise(images), layers)
        return [o.transpose(1, 2).unflatten(2, grid) for o in outputs]

    def resized(self, size: tuple[int, int]) -> Encoder:
        """The same encoder whose own image size, in pixels, is another: its positions interpolated once and for all.

        A second time interpolates the interpolated ones: begin from the encoder as it was loaded. Raises UserError where the
        patch does not divide the size.
        """
        vit = copy.deepcopy(self.vit)
        vit.config = replace(vit.config, image_size=size)
        vit.register_buffer("positions", self.vit.positions_for(size), persistent=False)
        return Encoder(vit, self.normalise, self.network, self.head, self.classes).eval()

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel that images are normalised with."""
        return self.normalise.statistics

"""I-JEPA: from one context block, predict the representations of target blocks of the same image.

Assran et al., 2023, https://arxiv.org/abs/2301.08243
B images, N patches, C contexts of K visible patches, M target blocks of T patches, D channels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openjepa.errors import UserError
from openjepa.masking import Masks
from openjepa.methods.method import Method
from openjepa.models.layers import Ragged, normalised_patches, take
from openjepa.models.predictor import Predictor, PredictorConfig
from openjepa.models.vit import ViT, ViTConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How far a prediction is from its target."""

    kind: Literal["released", "l2"] = "released"  # smooth-L1 on layer-normed targets, or the paper's formula
    target: Literal["encoder", "pixels"] = "encoder"  # the target encoder's features are predicted, or pixels (table 7)
    target_mask: Literal["output", "input"] = "output"  # of the target encoder, that targets are cut from (table 11)
    variance: float = 0.0  # weight of VICReg's variance term on the pooled context, as in C-JEPA; not in the paper
    covariance: float = 0.0  # weight of its covariance term
    projection: int = 512  # width that the pooled context is projected to for these two

    def __post_init__(self) -> None:
        if self.variance < 0 or self.covariance < 0 or self.projection < 1:
            raise UserError("loss.variance and loss.covariance must not be negative, loss.projection at least 1")
        if self.target == "pixels" and self.target_mask == "input":
            raise UserError(
                "loss.target_mask 'input' masks the target encoder, and loss.target 'pixels' has none: leave one out"
            )

    def levelled(self, features: Tensor) -> Tensor:
        """Target features [..., D] in float32, layer-normed where the released loss wants it."""
        features = features.float()
        return F.layer_norm(features, features.shape[-1:]) if self.kind == "released" else features

    @property
    def regularised(self) -> bool:
        return self.variance > 0 or self.covariance > 0

    def __call__(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """predictions, targets: [B, M, T, D]. Returns each image's own, [B]; a batch's loss is their mean."""
        predictions = predictions.float()
        if self.kind == "released":
            return F.smooth_l1_loss(predictions, targets, reduction="none").mean((1, 2, 3))
        return (predictions - targets).square().sum((2, 3)).mean(1)  # section 3, "Loss"

    def regulariser(self, projected: Tensor) -> Tensor:
        """Variance and covariance terms (VICReg, Bardes et al., 2022; C-JEPA, Mo & Tong, 2024, arXiv 2410.19560).

        projected: [B, P], one row an image. Keeps every dimension's deviation over the batch at 1 or more, and
        dimensions apart. Returns a scalar.
        """
        projected = projected.float()
        b, p = projected.shape
        centred = projected - projected.mean(0)
        variance = F.relu(1 - (centred.square().sum(0) / (b - 1) + 1e-4).sqrt()).mean()
        covariance = (centred.T @ centred / (b - 1)).fill_diagonal_(0).square().sum() / p
        return self.variance * variance + self.covariance * covariance


def projector(width: int, projection: int) -> nn.Sequential:
    """From pooled features to where variance and covariance are measured; thrown away after training."""
    return nn.Sequential(nn.Linear(width, projection), nn.GELU(), nn.Linear(projection, projection))


class IJEPA(Method):
    """The context encoder, the predictor, and the target encoder that follows the context encoder."""

    follows = {"target_encoder": "encoder"}  # noqa: RUF012
    task = "The context encoder sees the patches of the middle row; from them the predictor must tell what the coloured ones hold."

    def __init__(self, model: ViTConfig, predictor: PredictorConfig, loss: LossConfig) -> None:
        super().__init__()
        self.loss = loss
        self.encoder = ViT(model)
        out = model.channels * model.patch_size**2 if loss.target == "pixels" else model.dim
        self.predictor = Predictor(predictor, model, out)
        self.projector = projector(model.dim, loss.projection) if loss.regularised else None
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False).eval()

    def forward(self, images: Tensor, masks: Masks, small: Tensor | None = None) -> dict[str, Tensor]:
        """images: [B, channels, H, W], normalised. Returns `loss` (scalar) and `losses` [B], each image's own, without gradient."""
        targets = self.targets(images, masks)  # B M T D
        losses = torch.stack([self.context_loss(images, masks, c, targets) for c in range(masks.context.shape[1])])
        return {"loss": losses.mean(), "losses": losses.detach().mean(0)}

    @torch.no_grad()
    def targets(self, images: Tensor, masks: Masks) -> Tensor:
        """What is to be predicted of every block, [B, M, T, D].

        The target encoder sees the whole image and its output is masked; or its input, so that it sees one block at a time
        (table 11). Or the block's own pixels, each patch normalised (table 7).
        """
        blocks = masks.targets.shape[1:]
        if self.loss.target == "pixels":
            return take(normalised_patches(images, self.encoder.config.patch_size), masks.targets.flatten(1)).unflatten(
                1, blocks
            )
        if self.loss.target_mask == "input":
            each = [self.target_encoder(images, block) for block in masks.targets.unbind(1)]
            return self.loss.levelled(torch.stack(each, 1))
        features = self.loss.levelled(self.target_encoder(images))  # B N D
        return take(features, masks.targets.flatten(1)).unflatten(1, blocks)

    def context_loss(self, images: Tensor, masks: Masks, c: int, targets: Tensor) -> Tensor:
        """One context's prediction errors, [B], and the regulariser of the batch on each if there is one."""
        context, visible, ragged = self.encode_context(images, masks, c)
        loss = self.loss(self.predictor(context, visible, masks.targets, ragged), targets)
        if self.projector is None:
            return loss
        if ragged is not None:
            pooled = ragged.pad(context).sum(1) / ragged.mask.sum(1, keepdim=True)
        else:
            pooled = context.mean(1)
        return loss + self.loss.regulariser(self.projector(pooled))

    def encode_context(self, images: Tensor, masks: Masks, c: int) -> tuple[Tensor, Tensor, Ragged | None]:
        """Encode the visible patches of the c-th context alone. Returns [B, K, D], or [total, D] and its layout."""
        visible = masks.context[:, c]
        ragged = None
        if masks.lengths is not None:
            if masks.context.shape[1] > 1:
                raise UserError("masking.context 'packed' takes one context block: use 'even' with several")
            ragged = Ragged(torch.arange(visible.shape[1], device=visible.device) < masks.lengths, masks.total)
        return self.encoder(images, visible, ragged), visible, ragged

"""What a decoder is told of an image: one vector, from frozen networks.

B images, N patches, T patches of a block, D channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openjepa.errors import UserError
from openjepa.masking import Masks
from openjepa.methods.ijepa import IJEPA
from openjepa.methods.method import Method
from openjepa.models.layers import take

Of = Literal["prediction", "block", "image"]
# prediction: of the block, by context encoder and predictor from all patches outside of it (I-JEPA, figure 6)
# block: the target encoder's own features of it, which the prediction is of: the oracle
# image: the target encoder's features of the whole image (figures 7 and 8)


class Condition(nn.Module):
    """One vector of an image, averaged over patches. Predictions and target features lie in one space, that of the targets."""

    def __init__(self, networks: Method, of: Of) -> None:
        """Raises UserError where the networks predict no features."""
        super().__init__()
        predicts = isinstance(networks, IJEPA) and networks.loss.target == "encoder"
        if of == "prediction" and not predicts:
            raise UserError(
                "this run has no predictor of features, which I-JEPA's has: --rcdm.of block or --rcdm.of image "
                "condition on what its encoder sees"
            )
        self.networks, self.of = networks.eval().requires_grad_(False), of
        self.width = networks.product.config.dim

    def forward(self, images: Tensor, masks: Masks) -> Tensor:
        """images: [B, C, H, W], normalised; masks: one context and one block. Returns float32 [B, D]."""
        if self.of == "prediction":
            return self.predicted(images, masks)
        return self.features(images, None if self.of == "image" else masks.targets[:, 0])

    @torch.no_grad()
    def predicted(self, images: Tensor, masks: Masks) -> Tensor:
        """What the predictor expects at the block's places, from the visible patches alone; a place enters by its mask tokens."""
        assert isinstance(self.networks, IJEPA)
        visible = masks.context[:, 0]
        features = self.networks.predictor(self.networks.encoder(images, visible), visible, masks.targets)
        return features.float().mean((1, 2))

    @torch.no_grad()
    def features(self, images: Tensor, block: Tensor | None = None) -> Tensor:
        """What the target encoder makes of a block [B, T] in its image, or of the whole image; levelled as targets are."""
        features = self.levelled(self.networks.product(images))
        return (features if block is None else take(features, block)).mean(1)

    @torch.no_grad()
    def alone(self, images: Tensor, block: Tensor) -> Tensor:
        """The same of a block, when the encoder sees nothing else."""
        return self.levelled(self.networks.product(images, block)).mean(1)

    def levelled(self, features: Tensor) -> Tensor:
        if isinstance(self.networks, IJEPA):
            return self.networks.loss.levelled(features)
        return F.layer_norm(features.float(), features.shape[-1:])

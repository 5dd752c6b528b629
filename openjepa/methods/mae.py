"""MAE: from a quarter of an image's patches, paint the others.

He et al., 2021, https://arxiv.org/abs/2111.06377
B images, N patches of P pixels a side, K visible and T hidden ones, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from openjepa.errors import UserError
from openjepa.masking import MaskingConfig, Masks
from openjepa.methods.method import Method
from openjepa.models.layers import normalised_patches, patchify, take
from openjepa.models.predictor import Predictor, PredictorConfig
from openjepa.models.vit import ViT, ViTConfig


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """The decoder, and what it is to paint."""

    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    normalised: bool = True  # each patch by its own mean and deviation

    def __post_init__(self) -> None:
        if self.decoder_heads < 1 or self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise UserError(
                f"mae.decoder_width {self.decoder_width} must be divisible by mae.decoder_heads ({self.decoder_heads}) and by 4"
            )
        if self.decoder_width < 4 or self.decoder_depth < 1:
            raise UserError("mae.decoder_width must be at least 4, mae.decoder_depth at least 1")


MASKING = MaskingConfig(strategy="random", hidden=0.75, min_keep=1)  # the paper's, and its recipes'


class MAE(Method):
    """The encoder of what is visible, and the decoder of what is not: a predictor whose targets are pixels.

    Attention knows no order, so the decoder gets the visible tokens first and the mask tokens after them, each with its
    position, and its final block computes the hidden patches alone: the same numbers as from a sequence in raster order.
    """

    task = "The encoder sees the patches of the middle row; from them the decoder must paint the coloured ones."

    def __init__(self, model: ViTConfig, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViT(model)
        decoder = PredictorConfig(width=config.decoder_width, depth=config.decoder_depth, heads=config.decoder_heads)
        self.decoder = Predictor(decoder, model, model.channels * model.patch_size**2)
        initialise(self)

    def forward(self, images: Tensor, masks: Masks, small: Tensor | None = None) -> dict[str, Tensor]:
        """images: [B, channels, H, W], normalised. Returns `loss` (scalar) and `losses` [B], each image's own, without gradient.

        masks: one context and one block of targets, which together are all patches.
        """
        losses = (self.painted(images, masks) - self.targets(images, masks)).square().mean((1, 2))
        return {"loss": losses.mean(), "losses": losses.detach()}

    def painted(self, images: Tensor, masks: Masks) -> Tensor:
        """What the decoder makes of the hidden patches, float32 [B, T, channels * P * P]."""
        visible = masks.context[:, 0]
        latent = self.encoder.tokens(images, visible)  # B prefix+K D: the class token is decoded, too
        return self.decoder(latent, visible, masks.targets)[:, 0].float()

    def targets(self, images: Tensor, masks: Masks) -> Tensor:
        """The hidden patches themselves, float32 [B, T, channels * P * P]."""
        side = self.encoder.config.patch_size
        patches = normalised_patches(images, side) if self.config.normalised else patchify(images, side).float()
        return take(patches, masks.targets[:, 0])


def initialise(method: MAE) -> None:
    """Xavier-uniform for every matrix, the patches' convolution as one; its bias stays as torch makes it, the others are 0."""
    for module in method.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            bound = module.weight[0].numel() ** -0.5
            assert module.bias is not None
            nn.init.uniform_(module.bias, -bound, bound)
    for token in (method.encoder.prefix_tokens, method.decoder.mask_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)

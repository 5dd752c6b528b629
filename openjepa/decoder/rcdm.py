"""RCDM: a diffusion model that paints what a representation holds.

Bordes et al., 2022, https://arxiv.org/abs/2112.09164, as I-JEPA's appendix E uses it; the U-Net is ADM's (Dhariwal & Nichol, 2021).
B images, C channels, S pixels a side of what is painted, D channels of the representation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from openjepa.decoder.condition import Condition, Of
from openjepa.decoder.place import block_boxes, cut
from openjepa.errors import UserError, needs
from openjepa.masking import Masks
from openjepa.methods.method import Method
from openjepa.models.encoder import Normalise
from openjepa.models.layers import Recompute

STEPS = 1000  # of the diffusion
BETAS = (1e-4, 0.02)  # first and last variance of the noise that a step adds, linear between


@dataclass(frozen=True, kw_only=True)
class RCDMConfig:
    """For which run, what is painted from what, and the U-Net's sizes."""

    run: str = ""  # whose representation it is made for: where it lay when training last began
    step: int = 0  # of that run
    fingerprint: str = ""  # of its weights: no other run's representation can be painted
    networks: Literal["trained", "random"] = "trained"  # random: those that the run began with, as a control
    of: Of = "prediction"  # what it is told: prediction or block (of a hidden block), or image
    paint: Literal["block", "image"] = "block"  # what it paints
    size: int = 64  # pixels a side of what is painted, a square
    width: int = 128  # channels of the first level
    multipliers: tuple[int, ...] = (
        1,
        2,
        3,
        4,
    )  # of the width, at each level; every next one has half the pixels a side
    blocks: int = 2  # residual blocks of a level on the way down; one more on the way up
    attention: tuple[int, ...] = (16, 8)  # sides of the feature maps that attend; those of the middle always do
    head_width: int = 64  # channels of an attention head
    predict: Literal["noise", "velocity"] = "noise"  # the paper's; or what also weighs the steps that begin a picture
    learn_variance: bool = False  # of the reverse steps, by the variational bound (Nichol & Dhariwal, 2021)

    def __post_init__(self) -> None:
        if min(self.size, self.width, self.blocks, self.head_width, *self.multipliers, 1) < 1 or not self.multipliers:
            raise UserError("rcdm: size, width, blocks, head_width and all multipliers must be at least 1")
        if self.width % 4:
            raise UserError(f"rcdm.width is {self.width}: it must be divisible by 4")
        if len(self.multipliers) > 8 or self.size % 2 ** (len(self.multipliers) - 1):
            raise UserError(
                f"rcdm.size {self.size} cannot be halved {len(self.multipliers) - 1} times: give fewer rcdm.multipliers, or "
                "another size"
            )
        if self.of == "image" and self.paint == "block":
            raise UserError("rcdm.of 'image' knows no block: set rcdm.paint image")

    @property
    def sides(self) -> list[int]:
        """Pixels a side of each level's feature maps."""
        return [self.size // 2**level for level in range(len(self.multipliers))]


class Denoiser(nn.Module):
    """The noise in a picture, given a representation: one linear layer takes it to where the U-Net knows the time."""

    def __init__(self, config: RCDMConfig, channels: int, width: int) -> None:
        """width: of the representation. Raises UserError where diffusers is missing."""
        super().__init__()
        with needs("decode"):
            from diffusers import UNet2DModel
        attends = [side in config.attention for side in config.sides]
        self.unet = UNet2DModel(
            sample_size=config.size,
            in_channels=channels,
            out_channels=channels * (2 if config.learn_variance else 1),
            block_out_channels=tuple(config.width * m for m in config.multipliers),
            layers_per_block=config.blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
            downsample_type="resnet",  # inside residual blocks
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=math.gcd(config.head_width, config.width),
            norm_num_groups=math.gcd(32, config.width),
            attn_norm_num_groups=math.gcd(32, config.width),
            class_embed_type="identity",  # added to the time's embedding
        )
        self.embed = nn.Linear(width, 4 * config.width)
        initialise(self.unet)

    def forward(self, noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """noisy: [B, C, S, S]; t: int64 [B]; condition: [B, D]. Returns float32 [B, C or 2 C, S, S]."""
        out: Tensor = self.unet(noisy, t, self.embed(condition)).sample
        return out.float()


def initialise(unet: nn.Module) -> None:
    """Every residual branch, and the output, begins at zero, as in ADM; diffusers leaves it to chance."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    zeros: list[Any] = [m.conv2 for m in unet.modules() if isinstance(m, ResnetBlock2D)]
    zeros += [m.to_out[0] for m in unet.modules() if isinstance(m, Attention)]
    for layer in (*zeros, unet.conv_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


class RCDM(Method):
    """A denoiser that learns, and its average over time, which paints. The networks that it is told by are no part of it:
    they learn nothing, and lie in no checkpoint."""

    follows = {"average": "denoiser"}  # noqa: RUF012
    represents: ClassVar[bool] = False

    def __init__(self, config: RCDMConfig, condition: Condition, normalise: Normalise) -> None:
        """condition, normalise: of the run that it is made for."""
        super().__init__()
        self.config, self.normalise = config, normalise
        self._beside = [condition]  # a list hides it from torch
        self.channels = condition.networks.product.config.channels
        self.denoiser = Denoiser(config, self.channels, condition.width)
        self.average = copy.deepcopy(self.denoiser).requires_grad_(False).eval()
        self.diffusion = Diffusion()
        self.part = (0, 1)

    @property
    def device(self) -> torch.device:
        return self.denoiser.embed.weight.device

    @property
    def condition(self) -> Condition:
        return self._beside[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RCDM:
        """Where it goes, they go."""
        self.condition._apply(fn)
        return super()._apply(fn, recurse)

    def share(self, number: int, of: int) -> None:
        super().share(number, of)
        self.part = (number, of)

    def compile_blocks(self) -> None:
        self.denoiser.compile()

    def recompute_blocks(self, how: Recompute) -> None:
        if how != "none":  # diffusers knows one way
            self.denoiser.unet.enable_gradient_checkpointing()

    def forward(self, images: Tensor, masks: Masks, small: Tensor | None = None) -> dict[str, Tensor]:
        """images: [B, C, H, W], normalised. Returns `loss` (scalar) and `losses` [B], each image's own, without gradient."""
        clean = self.target(images, masks)
        t, noise = self.draw(clean)
        out = self.denoiser(self.noisy(clean, t, noise), t, self.condition(images, masks))
        losses = (out[:, : self.channels] - self.asked(clean, t, noise)).square().mean((1, 2, 3))
        if self.config.learn_variance:
            losses = losses + self.bound(clean, t, noise, out)
        return {"loss": losses.mean(), "losses": losses.detach()}

    @torch.no_grad()
    def target(self, images: Tensor, masks: Masks) -> Tensor:
        """What is to be painted, from -1 to 1, [B, C, S, S]."""
        mean, std = self.normalise.get_buffer("mean"), self.normalise.get_buffer("std")
        return cut(2 * (images * std + mean) - 1, self.boxes(images, masks), self.config.size)

    def boxes(self, images: Tensor, masks: Masks) -> Tensor:
        """Where what is painted lies, [B, 4]."""
        if self.config.paint == "block":
            model = self.condition.networks.product.config
            return block_boxes(masks.targets[:, 0], model.grid, model.patch_size)
        height, width = images.shape[-2:]
        return images.new_tensor([[0, 0, width, height]]).expand(len(images), -1)

    def draw(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Time and noise for each image, [B] and [B, C, S, S], by torch's generator, which the loop seeds in every step.

        All processes draw for all, so that their number changes nothing.
        """
        (number, of), b = self.part, len(clean)
        mine = slice(number * b, (number + 1) * b)
        t = torch.randint(STEPS, (of * b,), device=clean.device)[mine]
        return t, torch.randn(of * b, *clean.shape[1:], device=clean.device)[mine]

    def noisy(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.diffusion.at("signal", t) * clean + self.diffusion.at("rest", t) * noise

    def asked(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the denoiser is to tell: the noise, or the velocity (Salimans & Ho, 2022).

        Where nearly all is noise, a picture hardly shows in it, and a denoiser must learn for long before it heeds there what it
        is told, though the colours of a sample are settled there. The velocity is nearly the picture itself there.
        """
        if self.config.predict == "noise":
            return noise
        return self.diffusion.at("signal", t) * noise - self.diffusion.at("rest", t) * clean

    def bound(self, clean: Tensor, t: Tensor, noise: Tensor, out: Tensor) -> Tensor:
        """The variational bound's term of time t, which teaches the variances alone, [B], in bits a number.

        The divergence of the true step back from the model's; at t = 0, what it costs to tell the 8-bit pixels.
        """
        at = self.diffusion.at
        guess, logits = out.detach()[:, : self.channels], out[:, self.channels :]
        share = (logits + 1) / 2
        log_variance = share * at("largest", t) + (1 - share) * at("smallest", t)
        noisy = self.noisy(clean, t, noise)
        if self.config.predict == "noise":
            painted = (noisy - at("rest", t) * guess) / at("signal", t)
        else:
            painted = at("signal", t) * noisy - at("rest", t) * guess
        mean, true_mean = (at("of_clean", t) * start + at("of_noisy", t) * noisy for start in (painted, clean))
        true_log = at("smallest", t)
        apart = (true_log - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp()
        divergence = 0.5 * (log_variance - true_log - 1 + apart)
        told = torch.where(t.view(-1, 1, 1, 1) == 0, pixel_cost(clean, mean, log_variance), divergence)
        return told.mean((1, 2, 3)) / math.log(2)


class Diffusion(nn.Module):
    """Noise in a picture at each time, and what a step back is made of (Ho et al., 2020, equations 4 and 7)."""

    def __init__(self) -> None:
        super().__init__()
        betas = torch.linspace(*BETAS, STEPS, dtype=torch.float64)
        bar = torch.cumprod(1 - betas, 0)
        before = torch.cat([bar.new_ones(1), bar[:-1]])
        smallest = betas * (1 - before) / (1 - bar)
        smallest[0] = smallest[1]  # at t = 0 there is none
        values = {
            "signal": bar.sqrt(),
            "rest": (1 - bar).sqrt(),
            "largest": betas.log(),  # of the variances of a step back
            "smallest": smallest.log(),
            "of_clean": betas * before.sqrt() / (1 - bar),  # in the mean of a step back
            "of_noisy": (1 - before) * (1 - betas).sqrt() / (1 - bar),
        }
        for name, value in values.items():
            self.register_buffer(name, value.float(), persistent=False)

    def at(self, name: str, t: Tensor) -> Tensor:
        """[B, 1, 1, 1]"""
        return self.get_buffer(name)[t].view(-1, 1, 1, 1)


def pixel_cost(pixels: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Minus the log of the probability that a Gaussian gives to 8-bit pixels, scaled to -1 to 1: the bin around each."""
    scale = (-0.5 * log_variance).exp()
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.cdf((pixels - mean + 1 / 255) * scale).where(pixels < 0.999, torch.ones_like(pixels))
    lower = normal.cdf((pixels - mean - 1 / 255) * scale).where(pixels > -0.999, torch.zeros_like(pixels))
    return -(upper - lower).clamp(min=1e-12).log()

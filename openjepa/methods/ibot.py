"""iBOT: views of an image are to agree, and hidden patches with what a teacher sees in their place.

Zhou et al., 2022, https://arxiv.org/abs/2111.07832; without its patch loss it is DINO (Caron et al., 2021).
B images, G large crops of N patches, L small crops, K prototypes, D channels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from openjepa.errors import UserError
from openjepa.masking import TokenMasks
from openjepa.methods.method import Method
from openjepa.models.vit import ViT, ViTConfig


@dataclass(frozen=True, kw_only=True)
class IBOTConfig:
    """The head, the losses, and how sharp student and teacher are."""

    prototypes: int = 8192  # K
    hidden: int = 2048  # of the head's MLP
    bottleneck: int = 256
    class_weight: float = 1.0  # of the loss between views
    patch_weight: float = 1.0  # of the loss on hidden patches; 0 is DINO, and nothing is hidden
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07  # of class tokens, after the warm-up
    patch_temperature: float = 0.07  # of patches, after the warm-up
    first_temperature: float = 0.04  # of both, at its start
    # of linear warm-up; null: 29, as released (30 values, from the first epoch to the thirtieth), a quarter of shorter runs
    temperature_epochs: float | None = None
    centre_momentum: float = 0.9
    norm_last_layer: bool = True  # prototypes keep length 1
    # at the start, in which the prototypes do not move; null: 1, as released, an eighth of shorter runs
    freeze_last_layer_epochs: float | None = None

    def __post_init__(self) -> None:
        sizes = self.prototypes, self.hidden, self.bottleneck
        if min(sizes) < 1 or max(sizes) > 2**20:
            raise UserError(f"ibot.prototypes, ibot.hidden and ibot.bottleneck must be between 1 and {2**20:,}")
        if min(self.class_weight, self.patch_weight) < 0 or self.class_weight + self.patch_weight == 0:
            raise UserError("ibot.class_weight and ibot.patch_weight must not be negative, nor both 0")
        for name in ("student_temperature", "teacher_temperature", "patch_temperature", "first_temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"ibot.{name} is {getattr(self, name)}: it must be above 0")
        if (
            not 0 <= self.centre_momentum < 1
            or min(self.temperature_epochs or 0, self.freeze_last_layer_epochs or 0) < 0
        ):
            raise UserError(
                "ibot.centre_momentum must be in [0, 1), ibot.temperature_epochs and ibot.freeze_last_layer_epochs not negative"
            )

    def of_run(self, epochs: float) -> IBOTConfig:
        """With what depends on the length of the run filled in."""
        warm = min(29, epochs / 4) if self.temperature_epochs is None else self.temperature_epochs
        frozen = min(1, epochs / 8) if self.freeze_last_layer_epochs is None else self.freeze_last_layer_epochs
        return replace(self, temperature_epochs=warm, freeze_last_layer_epochs=frozen)

    def temperatures(self, epoch: float) -> tuple[float, float]:
        """The teacher's for class tokens and for patches: linear from the first, then constant. epoch: with its fraction."""
        progress = min(1.0, epoch / self.temperature_epochs) if self.temperature_epochs else 1.0
        first = self.first_temperature
        classes, patches = (
            first + (last - first) * progress for last in (self.teacher_temperature, self.patch_temperature)
        )
        return classes, patches


class Head(nn.Module):
    """A shared projection of class tokens and patches onto prototypes."""

    def __init__(self, width: int, config: IBOTConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.hidden), nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )  # fmt: skip
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last = weight_norm(nn.Linear(config.bottleneck, config.prototypes, bias=False))
        lengths = self.last.parametrizations.weight.original0
        nn.init.ones_(lengths)
        lengths.requires_grad_(not config.norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to logits [..., K]."""
        return cast(Tensor, self.last(F.normalize(self.mlp(x), dim=-1)))


class IBOT(Method):
    """Student and teacher, each an encoder and a head; the teacher follows the student and sees large crops, whole."""

    follows = {"target_encoder": "encoder", "target_head": "head"}  # noqa: RUF012
    task = (
        "The student sees a learned vector in place of the coloured patches, if any, and must tell what the teacher makes of them; "
        "and it must tell alike what shows the same image."
    )
    centres: Tensor  # [2, K], of class tokens and of patches

    def __init__(self, model: ViTConfig, config: IBOTConfig) -> None:
        """model: with a class token, which every recipe's is (recipes/methods.py). config: of the run, `IBOTConfig.of_run`."""
        super().__init__()
        assert model.class_token
        assert config.temperature_epochs is not None
        self.config = config
        self.encoder = ViT(model)
        self.head = Head(model.dim, config)
        self.mask_token = nn.Parameter(torch.zeros(1, model.dim))  # two-dimensional, thus decayed, as in the release
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self.target_head = copy.deepcopy(self.head).requires_grad_(False).eval()
        self.register_buffer("centres", torch.zeros(2, config.prototypes))
        self.temperatures = config.temperatures(0)

    def forward(self, images: Tensor, masks: TokenMasks, small: Tensor | None = None) -> dict[str, Tensor]:
        """images: [B, G, channels, H, W], small: [B, L, channels, h, w], normalised; masks: of the large crops.

        Returns `loss` (scalar), `losses` [B], each image's own, without gradient, and `means` [2, K], of the teacher's logits.
        """
        b, g = images.shape[:2]
        large = images.flatten(0, 1)
        with torch.no_grad():
            seen = self.target_encoder.tokens(large)
            teacher_class = self.target_head(seen[:, 0])  # BG K
            teacher_patch = self.target_head(seen[:, self.encoder.prefix :]) if self.config.patch_weight else None
        hidden = masks.hidden.flatten(0, 1)
        tokens = self.encoder.tokens(large, hidden=(hidden, self.mask_token))
        student_class = self.head(tokens[:, 0]).unflatten(0, (b, g))
        if small is not None:
            others = self.encoder.tokens(small.flatten(0, 1))[:, 0]
            student_class = torch.cat([student_class, self.head(others).unflatten(0, small.shape[:2])], 1)  # B G+L K
        losses = self.config.class_weight * self.class_loss(student_class, teacher_class.unflatten(0, (b, g)))
        means = torch.zeros_like(self.centres)
        means[0] = teacher_class.float().mean(0)
        if teacher_patch is not None:
            means[1] = teacher_patch.float().mean((0, 1))
            where = torch.nonzero_static(hidden.flatten(), size=masks.total)[:, 0]
            student_patch = self.head(tokens[:, self.encoder.prefix :].flatten(0, 1).index_select(0, where))
            target = teacher_patch.flatten(0, 1).index_select(0, where)
            patches = self.patch_loss(student_patch, target, hidden, where)
            losses = losses + self.config.patch_weight * patches.unflatten(0, (b, g)).mean(1)
        return {"loss": losses.mean(), "losses": losses.detach(), "means": means}

    def class_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Cross-entropy of every view with every other large crop as the teacher sees it. [B, G+L, K], [B, G, K] to [B]."""
        p = self.sharpened(teacher, 0)
        log_q = self.log_student(student)
        crosses = -torch.einsum("bgk,bvk->bgv", p, log_q)
        g, v = crosses.shape[1:]
        other = ~torch.eye(g, v, dtype=torch.bool, device=crosses.device)
        return (crosses * other).sum((1, 2)) / (g * (v - 1))

    def patch_loss(self, student: Tensor, teacher: Tensor, hidden: Tensor, where: Tensor) -> Tensor:
        """Mean cross-entropy over the hidden patches of each crop, 0 where none is.

        student, teacher: [total, K] of the hidden patches; hidden: bool [BG, N]; where: their places, int64 [total]. Returns [BG].
        """
        crosses = -(self.sharpened(teacher, 1) * self.log_student(student)).sum(-1)
        of_crop = crosses.new_zeros(len(hidden)).index_add(0, where // hidden.shape[1], crosses)
        return of_crop / hidden.sum(-1).clamp(min=1)

    def sharpened(self, teacher: Tensor, kind: int) -> Tensor:
        """The teacher's distribution: centred, and sharpened by its temperature. kind: 0 class tokens, 1 patches."""
        return ((teacher.float() - self.centres[kind]) / self.temperatures[kind]).softmax(-1)

    def log_student(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.config.student_temperature).log_softmax(-1)

    def begin_step(self, epoch: float) -> None:
        self.temperatures = self.config.temperatures(epoch)

    def before_update(self, epoch: float) -> None:
        if epoch < (self.config.freeze_last_layer_epochs or 0):
            for parameter in self.head.last.parameters():
                parameter.grad = None  # so that neither it nor weight decay moves them

    @torch.no_grad()
    def after_step(self, momentum: float, learned: float | Tensor = 1.0, means: Tensor | None = None) -> None:
        super().after_step(momentum, learned)
        if means is not None:
            moved = torch.lerp(self.centres, means, 1 - self.config.centre_momentum)
            self.centres.copy_(torch.where(torch.as_tensor(learned, device=moved.device) > 0, moved, self.centres))

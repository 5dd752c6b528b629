"""AdamW, its parameter groups, and everything that changes with the step.

Values: I-JEPA, appendix A, and the released recipes. Schedules are functions of the step alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW

from openjepa.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with decoupled weight decay on matrices alone."""

    lr: float = 1e-3  # at the end of the warm-up
    start_lr: float = 2e-4  # at the first step
    final_lr: float = 1e-6  # at the last step
    weight_decay: float = 0.04  # at the first step
    final_weight_decay: float = 0.4  # at the last step
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None  # largest norm of all gradients together, or no clipping
    clip_each: float | None = None  # largest norm of each parameter's gradient (DINO, iBOT), or no clipping
    accumulate: int = 1  # parts that a rank's batch is computed in

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optim.lr is {self.lr}: it must be above 0 (the paper's is 1e-3)")
        for name in ("start_lr", "final_lr", "weight_decay", "final_weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}: it must not be negative")
        if self.start_lr > self.lr or self.final_lr > self.lr:
            raise UserError(
                f"optim.lr ({self.lr:g}) is the highest rate: optim.start_lr ({self.start_lr:g}) and optim.final_lr "
                f"({self.final_lr:g}) must not be above it"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0:
            raise UserError("optim.betas must be in [0, 1) and optim.eps above 0")
        for name in ("clip_norm", "clip_each"):
            if (limit := getattr(self, name)) is not None and limit <= 0:
                raise UserError(f"optim.{name} is {limit}: it must be above 0, or null for no clipping")
        if self.accumulate < 1:
            raise UserError(f"optim.accumulate is {self.accumulate}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, and how the rates move."""

    epochs: float = 300
    warmup_epochs: float = 40  # of linear rise
    ema: tuple[float, float] = (0.996, 1.0)  # target encoder's momentum at the first and last step
    ema_shape: Literal["linear", "cosine"] = "linear"  # between them: I-JEPA's, or iBOT's
    horizon: float = 1.0  # stretches lr, weight decay and EMA beyond the run's end (`ipe_scale` of the release)

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise UserError(f"schedule.epochs is {self.epochs}: it must be above 0")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"schedule.warmup_epochs ({self.warmup_epochs:g}) must be shorter than the run ({self.epochs:g} epochs): "
                "lower it or raise schedule.epochs"
            )
        if not 0 <= self.ema[0] <= 1 or not 0 <= self.ema[1] <= 1:
            raise UserError(f"schedule.ema is {self.ema}: momenta are between 0 and 1")
        if self.horizon < 1:
            raise UserError(f"schedule.horizon is {self.horizon}: it must be at least 1")


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and EMA momentum of each step (0 is the first)."""

    optim: OptimConfig
    config: ScheduleConfig
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return max(1, round(self.config.epochs * self.steps_per_epoch))

    @property
    def warmup(self) -> int:
        return int(self.config.warmup_epochs * self.steps_per_epoch)

    @property
    def span(self) -> int:
        """Steps over which the rates move."""
        return int(self.config.horizon * self.steps)

    def lr(self, step: int) -> float:
        """Linear warm-up, then a half cosine."""
        o, n = self.optim, step + 1
        if n <= self.warmup:
            return o.start_lr + (o.lr - o.start_lr) * n / self.warmup
        return o.final_lr + (o.lr - o.final_lr) * half_cosine((n - self.warmup) / max(1, self.span - self.warmup))

    def weight_decay(self, step: int) -> float:
        """A half cosine upward (the paper's text says linear; the release does this)."""
        o = self.optim
        return o.final_weight_decay + (o.weight_decay - o.final_weight_decay) * half_cosine((step + 1) / self.span)

    def momentum(self, step: int) -> float:
        """Linear, or a half cosine."""
        first, last = self.config.ema
        progress = step / self.span
        return first + (last - first) * (progress if self.config.ema_shape == "linear" else 1 - half_cosine(progress))


def half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(method: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over all that learns; `decay` marks the group whose weight decay moves.

    No decay on biases and vectors. The mask token is decayed, as in the release.
    """
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    free = [(n, p) for n, p in named if p.ndim <= 1 or n.endswith("bias")]
    free_names = {n for n, _ in free}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if n not in free_names], "decay": True},
        {"params": [p for _, p in free], "decay": False, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_rates(optimizer: AdamW, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay

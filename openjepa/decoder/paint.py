"""Pictures from representations: the diffusion backwards, with diffusers' schedulers.

B conditions, K samples of each, C channels, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from openjepa.decoder.rcdm import BETAS, RCDM, STEPS, RCDMConfig
from openjepa.errors import UserError, needs
from openjepa.rng import key

BATCH = 256  # pictures that are painted at once


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How it is drawn."""

    sampler: Literal["ddpm", "ddim"] = (
        "ddpm"  # with new noise in every step (the paper's), or with none after the first
    )
    steps: int = 100  # of the thousand, evenly spaced
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in ("ddpm", "ddim"):
            raise UserError(f"--sampler {self.sampler}: one of ddpm, ddim")
        if not 2 <= self.steps <= STEPS:
            raise UserError(f"--steps {self.steps}: give 2 to {STEPS}")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: it must not be negative")


def scheduler(sampling: Sampling, config: RCDMConfig) -> Any:
    """A scheduler of diffusers', its steps set; clean pictures are clipped to -1 to 1 in every step.

    DDPM's steps are spaced evenly from the first to the last; DDIM's are whole strides, as in the released RCDM.
    """
    with needs("decode"):
        from diffusers import DDIMScheduler, DDPMScheduler
    common = {
        "num_train_timesteps": STEPS,
        "beta_start": BETAS[0],
        "beta_end": BETAS[1],
        "clip_sample": True,
        "prediction_type": "epsilon" if config.predict == "noise" else "v_prediction",
    }
    if sampling.sampler == "ddpm":
        variance = "learned_range" if config.learn_variance else "fixed_small"
        made = DDPMScheduler(**common, variance_type=variance, timestep_spacing="linspace")
    else:
        made = DDIMScheduler(**common, timestep_spacing="leading")
    made.set_timesteps(sampling.steps)
    return made


@torch.no_grad()
def paint(method: RCDM, conditions: Tensor, samples: int, sampling: Sampling) -> Tensor:
    """Several pictures of each condition. conditions: [B, D]. Returns float32 [B, K, C, S, S] from 0 to 1, on the CPU.

    The noise of the k-th sample is a function of (seed, k): the same for all conditions, so that rows can be compared.
    """
    shape = (method.channels, method.config.size, method.config.size)
    device = method.device
    rows = [(b, k) for b in range(len(conditions)) for k in range(samples)]
    painted = []
    for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        noises = [torch.Generator().manual_seed(key(sampling.seed, f"noise {k}") % 2**63) for _, k in chunk]
        condition = conditions[[b for b, _ in chunk]].to(device)
        x = torch.stack([torch.randn(shape, generator=noise) for noise in noises]).to(device)
        schedule = scheduler(sampling, method.config)
        for t in schedule.timesteps.tolist():
            out = method.average(x, torch.full((len(x),), t, device=device), condition)
            if sampling.sampler == "ddim":  # as the release does, the noise is told anew from the clipped picture
                out = out[:, : method.channels]
                x = schedule.step(out, t, x, use_clipped_model_output=True).prev_sample
            else:
                x = schedule.step(out, t, x, generator=noises).prev_sample
        painted.append((x.clamp(-1, 1).cpu() + 1) / 2)
    return torch.cat(painted).unflatten(0, (len(conditions), samples))

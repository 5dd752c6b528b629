"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from openjepa import rng
from openjepa.data.stream import Batch
from openjepa.engine import parallel
from openjepa.engine.monitors import Watch
from openjepa.engine.optim import Schedule, set_rates
from openjepa.engine.run import Interrupted, Run
from openjepa.masking import Masks
from openjepa.models.vit import ViT


class Method(Protocol):
    """What the loop asks of a method; methods/ijepa.py is one."""

    encoder: ViT
    target_encoder: ViT

    def __call__(self, images: Tensor, masks: Masks) -> dict[str, Tensor]: ...
    def after_step(self, momentum: float) -> None: ...


def train(
    method: nn.Module,
    batches: Iterator[Batch],
    optimizer: AdamW,
    schedule: Schedule,
    run: Run,
    watch: Watch,
    *,
    forward: Callable[[Batch], dict[str, Tensor]],
    autocast: Callable[[], AbstractContextManager[None]],
    save_every: int,
    seed: int,
) -> None:
    """From the run's step to the schedule's end: a function of its arguments, wherever it started.

    forward: from a batch on the device to `loss` and `features`. save_every: steps between checkpoints.
    Raises Interrupted, after the checkpoint, when the run was asked to stop; UserError when the loss is not finite.
    """
    accumulate = schedule.optim.accumulate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    method.train()
    for step in range(run.step, schedule.steps):
        batch = watch.next(batches)
        torch.manual_seed((rng.key(seed, "step") + step) % 2**63)  # drop path, if any
        set_rates(optimizer, schedule.lr(step), schedule.weight_decay(step))
        loss = torch.zeros((), device=device)
        for part in batch.parts(accumulate):
            with autocast():
                out = forward(part.to(device))
            (out["loss"] / accumulate).backward()
            loss += out["loss"].detach() / accumulate
        parallel.average_gradients(method)
        norm = gradient_norm(parameters, schedule.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(schedule.momentum(step))  # type: ignore[operator]
        done = step + 1
        watch.after_step(done, batch, loss, norm, out["features"])
        if run.stopping or done % save_every == 0 or done == schedule.steps:
            watch.refuse_nonfinite(done, loss, norm)
            run.save(done, method, optimizer)
        if run.stopping and done < schedule.steps:
            raise Interrupted(f"checkpoint of step {done} written to {run.path}")


def gradient_norm(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of all gradients, clipped to `limit` when there is one. Stays on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm

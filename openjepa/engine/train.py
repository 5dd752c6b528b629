"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from openjepa import rng
from openjepa.data.stream import Batch
from openjepa.engine import parallel
from openjepa.engine.device import Later
from openjepa.engine.monitors import Outcome, Watch
from openjepa.engine.optim import OptimConfig, Schedule, set_rates
from openjepa.engine.run import Interrupted, Run
from openjepa.methods.method import Method


def train(
    method: Method,
    batches: Iterator[Batch],
    optimizer: AdamW,
    schedule: Schedule,
    run: Run,
    watch: Watch,
    *,
    forward: Callable[[Batch], dict[str, Tensor]],
    accumulating: Callable[[bool], AbstractContextManager[None]],
    autocast: Callable[[], AbstractContextManager[None]],
    save_every: int,
    seed: int,
) -> None:
    """From the run's step to the schedule's end: a function of its arguments, wherever it started.

    forward: from a batch on the device to `loss`, `losses` and perhaps `means`. accumulating: around each part of a batch; says
    whether it is the last. save_every: steps between checkpoints. A step that is not finite on any rank changes nothing.
    Raises Interrupted, after the checkpoint, when the run was asked to stop; UserError when too many steps are not finite.
    """
    parts = schedule.optim.accumulate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    method.train()
    for step in range(run.step, schedule.steps):
        batch = watch.next(step, batches)
        epoch = step / schedule.steps_per_epoch
        method.begin_step(epoch)
        torch.manual_seed((rng.key(seed, "step") + step) % 2**63)  # drop path, if any: the same on every rank
        set_rates(optimizer, schedule.lr(step), schedule.weight_decay(step))
        losses, means = [], []
        for i, part in enumerate(batch.parts(parts)):
            with accumulating(i == parts - 1):
                with autocast():
                    out = forward(part.to(device))
                (out["loss"] / parts).backward()
            losses.append((out["loss"].detach(), out["losses"]))
            means += [out["means"]] if "means" in out else []
        loss = torch.stack([loss for loss, _ in losses]).mean()
        vitals = parallel.mean(torch.stack([loss, *loss.new_tensor(run.wishes())]))
        norm = gradient_norm(parameters, schedule.optim)
        learned = (vitals[0].isfinite() & norm.isfinite()).float()  # stays on the device; the same on every rank
        method.before_update(epoch)
        optimizer.found_inf = 1 - learned  # type: ignore[attr-defined]  # where torch's fused kernels look whether to step
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(
            schedule.momentum(step), learned, parallel.mean(torch.stack(means).mean(0)) if means else None
        )
        done = step + 1
        told = Later(torch.stack([vitals[0], norm, *vitals[1:]]))
        watch.after_step(Outcome(done, batch, told, torch.cat([each for _, each in losses])))
        if run.stopping or done % save_every == 0 or done == schedule.steps:
            watch.settle()
            watch.note_bad_images()
            if (
                run.stopping or done == schedule.steps or not watch.bad_in_a_row
            ):  # older ones may be better than these weights
                run.save(done, method, optimizer)
        if run.stopping and done < schedule.steps:
            run.saver.wait()
            raise Interrupted(f"checkpoint of step {done} written to {run.path}", run.stopping)


def gradient_norm(parameters: list[nn.Parameter], limits: OptimConfig) -> Tensor:
    """The norm of all gradients, which are then clipped as the limits say. Stays on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = parallel.whole(nn.utils.get_total_norm(gradients, foreach=True))
    if limits.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, limits.clip_norm, norm, foreach=True)
    if limits.clip_each is not None:
        for gradient in gradients:
            gradient.mul_((limits.clip_each / (parallel.whole(gradient.norm()) + 1e-6)).clamp(max=1.0))
    return norm

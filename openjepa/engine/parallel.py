"""Every collective, each doing nothing in a single process."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> tuple[int, int]:
    """Rank and world size as torchrun gives them, whether or not the processes ever talk to each other."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def mean(values: Tensor) -> Tensor:
    """The mean over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.AVG)
    return values


def average_gradients(module: nn.Module) -> None:
    """Make every rank's gradients the mean of all."""
    if dist.is_initialized():
        for parameter in module.parameters():
            if parameter.grad is not None:
                mean(parameter.grad)

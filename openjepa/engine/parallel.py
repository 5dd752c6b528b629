"""Every collective, each doing nothing in a single process, and the ways to spread a method over ranks.

DDP: every rank holds all networks, gradients are averaged as backward makes them. FSDP2: every rank holds a share of every
parameter, of the target encoder's too, so that the moving average needs no communication.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returned a view: nothing here works in place on it
Strategy = Literal["ddp", "fsdp"]
DDP_OPTIONS: dict[str, Any] = {
    "gradient_as_bucket_view": True,
    next(  # buffers are constants; as torch calls it since 2.15, and before
        n for n in ("forward_sync_buffers", "broadcast_buffers") if n in signature(DistributedDataParallel).parameters
    ): False,
}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> tuple[int, int]:
    """Rank and world size as torchrun gives them, whether or not the processes ever talk to each other."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------- collectives


def mean(values: Tensor) -> Tensor:
    """The mean over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world_size()
    return values


def gather(value: T) -> list[T]:
    """What every rank has, in their order, for every rank."""
    if not dist.is_initialized():
        return [value]
    everyone: list[T | None] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone  # type: ignore[return-value]


def interleaved(mine: Tensor) -> Tensor:
    """Rows that were dealt out one to a rank, in their order again. mine: [n, ...] on every rank. Returns [n·W, ...]."""
    if not dist.is_initialized():
        return mine
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine.contiguous())
    return torch.stack(everyone, 1).flatten(0, 1)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def side_group() -> dist.ProcessGroup:
    """All ranks again, for a thread whose collectives must not mix with the training's."""
    return dist.new_group(backend="gloo")  # type: ignore[return-value]


def whole(value: Tensor) -> Tensor:
    """A sharded tensor's value, the same on every rank; others as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


# ---------------------------------------------------------------- spreading a method


def spread(method: nn.Module, strategy: Strategy, device: torch.device, half: bool) -> nn.Module:
    """What the loop calls: the method itself in a single process. half: all-gather parameters in bf16 (FSDP2)."""
    if world_size() == 1:
        return method
    if strategy == "ddp":
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(method, device_ids=ids, **DDP_OPTIONS)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    dtype = torch.bfloat16 if half else None  # gradients are summed in float32, activations left to autocast
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in method.children():
        for block in getattr(network, "blocks", []):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)
        for way in ("intermediate", "tokens"):  # how monitors and methods ask an encoder
            if hasattr(network, way):
                register_fsdp_forward_method(network, way)
    fully_shard(method, mesh=mesh, mp_policy=policy)
    return method


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients meet once a step, in the last of its parts."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    yield

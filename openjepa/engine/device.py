"""Which device, which precision."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from openjepa.errors import UserError, first_line

MOST_WORKERS = 16  # one makes about 1,000 crops of 224 pixels a second


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one, this process's own. Raises UserError for a device that is not here."""
    if name == "auto":
        here = torch.cuda.is_available()
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if here else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"machine.device '{name}' cannot be used here ({reason}): try cpu or auto") from error
    return device


Precision = Literal["auto", "bf16", "fp32"]
TrainingPrecision = Literal["auto", "bf16", "fp32", "fp8"]  # fp8: see fp8.py


def pick_precision(precision: TrainingPrecision, device: torch.device) -> Precision:
    """What `auto` means on this device: bf16 where it is the faster, else fp32. Of fp8, what is around it: bf16."""
    if precision == "fp8":
        return "bf16"
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bf16(device) else "fp32"


def pick_autocast(precision: TrainingPrecision, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 autocast, or nothing."""
    if pick_precision(precision, device) == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products pay. On CPUs measured: some that list the instructions run them at half the speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16")):
        return False
    x, w = torch.ones(2048, 512), torch.ones(512, 1024)
    halves = x.bfloat16(), w.bfloat16()
    seconds = {"fp32": [0.0] * 5, "bf16": [0.0] * 5}
    for i in range(5):
        for name, (a, b) in (("fp32", (x, w)), ("bf16", halves)):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds[name][i] = time.perf_counter() - start
    return min(seconds["bf16"]) * 1.2 < min(seconds["fp32"])


def pick_workers(workers: int | None, device: torch.device) -> int:
    """Processes that load images, as many as are asked for: else none on a CPU, whose cores they would take from the training,
    and beside a GPU its share of the cores, one of them left for the training."""
    if workers is not None:
        return workers
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


class Later:
    """A few numbers on their way to the host. Reading them waits for what made them, and for nothing that was queued since."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._there = values, None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        if self._there:
            self._there.synchronize()
        return [float(value) for value in self._values.tolist()]

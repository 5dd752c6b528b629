"""Which device, which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from openjepa.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one. Raises UserError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"machine.device '{name}' cannot be used here ({reason}): try cpu or auto") from error
    return device


def pick_autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 autocast, or nothing. precision: auto, bf16 or fp32."""
    if precision == "fp32" or (precision == "auto" and not has_fast_bf16(device)):
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware; elsewhere they are emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16"))
    return False

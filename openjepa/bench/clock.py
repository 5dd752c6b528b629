"""How things are timed: warmed up, medians with their spread, side by side in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Rows = list[dict[str, Any]]


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turn(ways: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every way, each run after the other so that what else the machine does meets all alike."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(warmup + repeats):
        for name, way in ways.items():
            start = now(device)
            way()
            if repeat >= warmup:
                seconds[name].append(now(device) - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median_s": median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def timed(way: Callable[[], Any], repeats: int = 15) -> dict[str, float]:
    """Median, fastest and slowest of several calls, after two to warm up."""
    return spread(in_turn({"": way}, repeats, warmup=2)[""])


def rate(what: str, count: int, times: dict[str, float]) -> dict[str, float]:
    return {f"{what}_per_s": count / times["median_s"], **times}

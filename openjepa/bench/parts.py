"""`openjepa bench masks`, `checksum`, `scenes`, `attention`, `context`, `ragged`, `probe`: parts of the system, one by one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from openjepa.bench.clock import Rows, in_turn, rate, timed
from openjepa.data.scenes import Job, render_range
from openjepa.engine.checkpoint import sha256
from openjepa.engine.device import pick_autocast, pick_precision
from openjepa.engine.optim import OptimConfig, build_optimizer
from openjepa.evaluate.features import Features
from openjepa.evaluate.linear import RECIPES, Probe
from openjepa.masking import MaskingConfig, sample
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models.layers import Ragged, plain_attention, ragged_attention
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig


def masks() -> Rows:
    """Masks of 256 images on a 14x14 grid, on one core."""
    rows: Rows = []
    for settings in ({}, {"context": "packed"}, {"strategy": "block"}, {"strategy": "rasterized"}, {"strategy": "random"},
                     {"behaviour": "released"}):  # fmt: skip
        config = MaskingConfig(**settings)  # type: ignore[arg-type]
        times = timed(partial(sample, config, (14, 14), 0, 0, np.arange(256)), 5)
        rows.append({"masks": " ".join(settings.values()) or "multiblock even", **rate("images", 256, times)})
    return rows


def checksum(megabytes: int = 256) -> Rows:
    """SHA-256 of a file, as of every file of a checkpoint, on one core."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(np.random.default_rng(0).bytes(megabytes * 10**6))
        file.flush()
        times = timed(partial(sha256, Path(file.name)), 7)
    return [{"megabytes": megabytes, "gb_per_s": megabytes / 1000 / times["median_s"], **times}]


def scenes() -> Rows:
    """Composed and rendered scenes on one core."""
    sizes = ((64, 50), (128, 20), (224, 8))
    return [
        {"size_px": size, **rate("scenes", count, timed(partial(render_range, Job(0, 0, count, (size, size))), 7))}
        for size, count in sizes
    ]


def attention() -> Rows:
    """torch's fused attention against plain matrix products on the CPU, forward and backward."""

    def there_and_back(kernel: Callable[..., torch.Tensor], qkv: list[torch.Tensor]) -> None:
        kernel(*qkv).sum().backward()

    rows: Rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, heads, tokens, d in ((64, 3, 24, 64), (64, 3, 64, 64), (32, 6, 196, 64), (4, 12, 784, 64)):
            qkv = [torch.randn(batch, heads, tokens, d, dtype=dtype, requires_grad=True) for _ in range(3)]
            kernels: dict[str, Callable[..., torch.Tensor]] = {
                "plain": plain_attention,
                "fused": F.scaled_dot_product_attention,
            }
            times = in_turn({name: partial(there_and_back, kernel, qkv) for name, kernel in kernels.items()}, 15, 2)
            plain, fused = median(times["plain"]), median(times["fused"])
            shape = {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "heads": heads, "tokens": tokens}
            rows.append({**shape, "plain_s": plain, "fused_s": fused, "fused_over_plain": fused / plain})
    return rows


def ragged() -> Rows:
    """Attention over packed contexts on the CPU, forward and backward: padded and masked at once, in four buckets, by length."""
    rows: Rows = []
    for grid, heads, batch in (((14, 14), 6, 32), ((8, 8), 3, 128)):
        drawn = sample(MaskingConfig(context="packed"), grid, 0, 0, np.arange(batch))
        assert drawn.lengths is not None
        lengths = drawn.lengths[:, 0].sort().values
        cuts = {
            "masked": [batch],
            "four buckets": [batch * i // 4 for i in range(1, 5)],
            "by length": [i for i in range(1, batch + 1) if i == batch or lengths[i] != lengths[i - 1]],
        }
        for dtype in (torch.float32, torch.bfloat16):
            qkv = [torch.randn(drawn.total, heads, 64, dtype=dtype, requires_grad=True) for _ in range(3)]

            def there_and_back(ends: list[int], qkv: list[torch.Tensor] = qkv, lengths: torch.Tensor = lengths) -> None:
                grouped_attention(qkv, lengths, ends).sum().backward()

            times = in_turn({name: partial(there_and_back, ends) for name, ends in cuts.items()}, 15, 2)
            first = median(times["masked"])
            shape = {
                "dtype": str(dtype).removeprefix("torch."),
                "images": batch,
                "lengths": f"{lengths[0]} to {lengths[-1]}",
            }
            rows += [
                {**shape, "way": name, "median_s": median(taken), "over_masked": first / median(taken)}
                for name, taken in times.items()
            ]
    return rows


def grouped_attention(qkv: list[torch.Tensor], lengths: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Packed sequences, the shortest first, in groups of their own padding; `ends`: where each group ends."""
    out, first, token = [], 0, 0
    for end in ends:
        mine = lengths[first:end]
        total = int(mine.sum())
        layout = Ragged(torch.arange(int(mine.max())) < mine[:, None], total)
        q, k, v = (x[token : token + total] for x in qkv)
        out.append(ragged_attention(q, k, v, layout))
        first, token = end, token + total
    return torch.cat(out)


def context(steps: int = 24, warmup: int = 4) -> Rows:
    """A training step with evened and with packed contexts, in turn: ViT 192 x 6, 8x8 grid, batch 64, on the CPU."""
    method = IJEPA(
        ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=6),
        PredictorConfig(width=96, depth=3),
        LossConfig(),
    )
    optimizer = build_optimizer(method, OptimConfig())
    autocast = pick_autocast("auto", torch.device("cpu"))
    images = torch.randn(64, 3, 32, 32)
    times: dict[str, list[float]] = {"even": [], "packed": []}
    tokens: dict[str, list[float]] = {"even": [], "packed": []}
    for step in range(steps):
        for kind in times:
            config = MaskingConfig(context=kind)  # type: ignore[arg-type]
            drawn = sample(config, (8, 8), 0, step, np.arange(64) + 64 * step)
            start = time.perf_counter()
            with autocast():
                loss = method(images, drawn)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(0.996)
            if step >= warmup:
                times[kind].append(time.perf_counter() - start)
                tokens[kind].append(drawn.total / 64 if drawn.lengths is not None else drawn.context.shape[-1])
    return [
        {
            "context": kind,
            "images_per_s": 64 / median(times[kind]),
            "context_tokens": sum(tokens[kind]) / len(tokens[kind]),
        }
        for kind in times
    ]


def probe(images: int = 100_000, classes: int = 1000, width: int = 384) -> Rows:
    """The `fast` linear probe with 32 heads, chosen, refitted and scored: ViT-S features of noisy classes, on the CPU."""
    config = replace(RECIPES["fast"], lrs=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 4, width, generator=generator)

    def drawn(n: int) -> tuple[Features, torch.Tensor]:
        labels = torch.randint(classes, (n,), generator=generator)
        noise = torch.randn(n, 4, width, generator=generator)
        return Features(noise.mul_(4).add_(centres[labels]).numpy(), np.arange(n)), labels

    (train, labels), (test, expected) = drawn(images), drawn(images // 10)
    half = pick_precision("auto", device := torch.device("cpu")) == "bf16"
    start = time.perf_counter()
    found = Probe(config, train, labels, classes, device, half).run(test)
    taken = time.perf_counter() - start
    right = float((found.predictions == expected).float().mean())
    size = {"images": images, "classes": classes, "width": width, "heads": len(config.heads), "epochs": config.epochs}
    return [{**size, "precision": "bf16" if half else "fp32", "seconds": taken, "accuracy": right}]

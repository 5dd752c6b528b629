"""`openjepa bench train`: a training step beside the released algorithm's, its parts, and its share of the machine's peak.

Variants take turns on the same images and masks in one process, so that what else the machine does meets all of them alike.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from openjepa.bench.clock import Rows, in_turn, now, spread
from openjepa.engine.device import TrainingPrecision, pick_autocast, pick_device, pick_precision
from openjepa.engine.fp8 import has_fp8, use_fp8
from openjepa.engine.optim import OptimConfig, build_optimizer
from openjepa.engine.train import gradient_norm
from openjepa.masking import MaskingConfig, Masks, TokenMasks, sample
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.methods.method import Method
from openjepa.models import layers
from openjepa.models.layers import Block, Layout, PatchEmbed, Recompute, Shared, patchify, shared_attention, take
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig

MASKS = 6  # batches of masks that take turns: block sizes differ from one to the next
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("target_encoder", "context_encoder", "predictor", "backward", "optimizer", "ema")


@dataclass(frozen=True)
class Case:
    """A model, and how many images a step has."""

    name: str
    model: ViTConfig
    predictor: PredictorConfig
    batch: int
    recompute: Recompute = "none"  # of activations, where they would not fit otherwise


CPU = (
    Case(
        "ViT 192x12/4, 32 px", ViTConfig(size="Ti", image_size=(32, 32), patch_size=4), PredictorConfig(width=96), 128
    ),
    Case("ViT-S/16, 224 px", ViTConfig(size="S"), PredictorConfig(width=192), 32),
    Case("ViT-B/16, 224 px", ViTConfig(size="B"), PredictorConfig(), 16),
)
CUDA = (
    Case("ViT-B/16, 224 px", ViTConfig(size="B"), PredictorConfig(), 256),
    Case("ViT-L/16, 224 px", ViTConfig(size="L"), PredictorConfig(depth=12), 128),
    Case(
        "ViT-H/14, 224 px", ViTConfig(size="H", patch_size=14), PredictorConfig(depth=12), 128
    ),  # as many as the paper's GPUs had
    Case("ViT-G/16, 224 px", ViTConfig(size="G"), PredictorConfig(depth=16), 128, recompute="selective"),
)


def cases(device: torch.device) -> tuple[Case, ...]:
    return CUDA if device.type == "cuda" else CPU


@dataclass(frozen=True)
class Variant:
    """One way to take a step."""

    name: str
    case: Case
    precision: TrainingPrecision
    plain: Sequence[str] = ()  # the techniques that it does without
    compiled: bool = False  # its blocks, by torch.compile


class Trainee:
    """A variant with its own weights, and what its steps took."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        self.variant, self.device = variant, device
        torch.manual_seed(0)
        case = variant.case
        with device:  # begun there: a CPU takes minutes for the largest
            self.method = IJEPA(case.model, case.predictor, LossConfig())
        self.method.train()
        if variant.precision == "fp8":
            use_fp8(self.method, device)
        self.method.recompute_blocks(case.recompute)
        if variant.compiled:
            torch.compiler.reset()  # torch compiles eight kinds of block, of all models before this one, and no more
            self.method.compile_blocks()
        self.optimizer: AdamW = build_optimizer(self.method, OptimConfig())
        if "fused updates" in variant.plain:
            groups = [{**group, "fused": False} for group in self.optimizer.param_groups]
            self.optimizer = AdamW(groups, foreach=False)
        self.autocast = pick_autocast(variant.precision, device)
        self.forget()

    def casts(self) -> float:
        """Seconds in which autocast rounds the target encoder's matrices, each step anew: what a kept copy would save."""
        matrices = [p for p in self.method.target_encoder.parameters() if p.ndim > 1]
        return median(in_turn({"": lambda: [p.bfloat16() for p in matrices]}, 5)[""])

    def most_memory(self, images: Tensor, masks: Sequence[Masks]) -> dict[str, float]:
        """What its steps hold at most: on a GPU what is allocated there, on Linux its weights and states and what a step takes
        of memory beside them. Says nothing where the system does not tell."""
        gc.collect()  # recomputed blocks hold themselves
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = 0
        else:
            kept = [*self.method.parameters(), *self.method.buffers()]
            kept += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
            try:
                before = resident("VmRSS") - sum(t.nbytes for t in kept)
                Path("/proc/self/clear_refs").write_text("5")  # forget the most there was
            except (OSError, AttributeError):  # not on Linux, or kept from it
                return {}
        for mask in masks:
            self.step(images, mask)
        del self.seconds[-len(masks) :]  # which had no turn
        most = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident("VmHWM")
        return {"peak_memory_gib": (most - before) / 2**30}

    def forget(self) -> None:
        """What was timed until now."""
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {part: [] for part in PARTS}

    def step(self, images: Tensor, masks: Masks, apart: bool = False) -> None:
        """One whole step. apart: timed by its parts, which a GPU is waited for after each of."""
        method, device, plain = self.method, self.device, self.variant.plain
        between = now if apart else lambda _: 0.0
        times = [now(device)]
        with without(plain):
            with self.autocast():
                targets = method.targets(images, masks)
                times.append(between(device))
                context, visible, ragged = method.encode_context(images, masks, 0)
                times.append(between(device))
                loss = method.loss(method.predictor(context, visible, masks.targets, ragged), targets).mean()
                times.append(between(device))
            loss.backward()
            times.append(between(device))
            gradient_norm([p for group in self.optimizer.param_groups for p in group["params"]], OptimConfig())
            self.optimizer.step()
            self.optimizer.zero_grad()
            times.append(between(device))
            if "fused updates" in plain:
                with torch.no_grad():
                    pairs = zip(method.target_encoder.parameters(), method.encoder.parameters(), strict=True)
                    for theirs, ours in pairs:
                        theirs.mul_(0.996).add_(0.004 * ours)
            else:
                method.after_step(0.996)
            times.append(now(device))
        if not apart:
            self.seconds.append(times[-1] - times[0])
            return
        for part, (start, end) in zip(PARTS, pairwise(times), strict=True):
            self.parts[part].append(end - start)


def train(steps: int = 12, warmup: int = 3) -> Rows:
    """The released algorithm as it stands, ours in either precision, compiled, and with the cheaper predictor."""

    def variants(case: Case, device: torch.device) -> list[Variant]:
        best = pick_precision("auto", device)
        shared = replace(case, predictor=replace(case.predictor, context="shared"))
        released = Variant("released", case, "fp32", plain=[*PLAIN])
        faster = [
            Variant(f"compiled, {best}", case, best, compiled=True),
            Variant(f"shared context, {best}", shared, best),
        ]
        if device.type == "cpu":
            return [released, Variant("float32", case, "fp32"), Variant("bf16", case, "bf16"), *faster]
        fits = [released] if case.recompute == "none" else []  # in float32
        eight = [Variant("compiled, fp8", case, "fp8", compiled=True)] if has_fp8(device) else []
        return [*fits, Variant(best, case, best), *faster, *eight]

    return measured(variants, steps, warmup)


def techniques(steps: int = 12, warmup: int = 2) -> Rows:
    """What each technique brings: ours, and ours without one of them."""

    def variants(case: Case, device: torch.device) -> list[Variant]:
        best = pick_precision("auto", device)
        return [
            Variant("openjepa", case, best),
            *(Variant(f"without {name}", case, best, plain=[name]) for name in PLAIN),
        ]

    return measured(variants, steps, warmup)


def measured(variants: Callable[[Case, torch.device], list[Variant]], steps: int, warmup: int) -> Rows:
    """Steps of every variant, for every case: on a CPU in turn, on a GPU, whose memory they fill, one after another.

    How much faster one is than the first: the median over pairs of steps with the same masks, and the quarters around it.
    """
    device = pick_device("auto")
    rows: Rows = []
    for case in cases(device):
        rates = {kind: matrix_peak(device, dtype, case) for kind, dtype in DTYPES.items()}
        peak = max(rates.values())
        peaks = {f"peak_{kind}_gflops": rate / 1e9 for kind, rate in rates.items()}
        images = torch.randn(case.batch, 3, *case.model.image_size, device=device)
        drawn = [sample(MaskingConfig(), case.model.grid, 0, s, np.arange(case.batch)) for s in range(MASKS)]
        masks = [m.to(device) for m in drawn]
        ways = variants(case, device)
        found: Rows = []
        taken: list[list[float]] = []
        for together in ([way] for way in ways) if device.type == "cuda" else [ways]:
            trainees = [Trainee(way, device) for way in together]
            for step in range(warmup + steps):
                for trainee in trainees:
                    trainee.step(images, masks[step % MASKS])
            for step in range(MASKS):
                for trainee in trainees:
                    trainee.step(images, masks[step], apart=True)
            taken += [trainee.seconds[warmup:] for trainee in trainees]
            found += [
                {**row(trainee, masks, warmup, peak), **peaks, **trainee.most_memory(images, masks)}
                for trainee in trainees
            ]
            del trainees, trainee
            for each in found[-len(together) :]:
                print(f"{case.name}, {each['variant']}: {each['images_per_s']:.1f} images/s", file=sys.stderr)
        baseline = f"over_{ways[0].name}"
        for each, seconds in zip(found, taken, strict=True):
            low, ratio, high = np.quantile(np.divide(taken[0], seconds), (0.25, 0.5, 0.75)).tolist()
            each |= {baseline: ratio, f"{baseline}_from": low, f"{baseline}_to": high}
            each["context_tokens"] = float(np.mean([m.context.shape[-1] for m in drawn]))
            each["target_tokens"] = float(np.mean([m.targets.shape[-1] for m in drawn]))
        rows += found
    return rows


def row(trainee: Trainee, masks: Sequence[Masks], warmup: int, peak: float) -> dict[str, Any]:
    """What a trainee's steps took, beside the work that is in them."""
    variant, seconds = trainee.variant, trainee.seconds[warmup:]
    work, batch = flops(variant.case, masks, variant.plain), variant.case.batch
    return {
        "model": variant.case.name,
        "variant": variant.name,
        "images_per_s": batch / median(seconds),
        **spread(seconds),
        "gflop_per_image": work / 1e9,
        "share_of_peak": work * batch / median(seconds) / peak,
        **{f"{part}_s": median(times) for part, times in trainee.parts.items()},
        "target_casts_s": 0.0 if variant.precision == "fp32" else trainee.casts(),
        "batch": batch,
    }


def resident(line: str) -> int:
    """Bytes of this process's memory, as Linux counts them: VmRSS now, VmHWM at most. What was freed is given back first.

    Raises AttributeError or OSError elsewhere.
    """
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{line}:\s*(\d+)", status)[0])


def profile(steps: int = 3) -> Rows:
    """Shares of a step's time by operator, the ten largest: what there is to win beside the matrix products."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    device = pick_device("auto")
    kind, spent = (ProfilerActivity.CUDA, "self_device_time_total") if device.type == "cuda" else (
        ProfilerActivity.CPU, "self_cpu_time_total")  # fmt: skip
    rows: Rows = []
    for case in cases(device):
        trainee = Trainee(Variant("", case, pick_precision("auto", device)), device)
        images = torch.randn(case.batch, 3, *case.model.image_size, device=device)
        masks = sample(MaskingConfig(), case.model.grid, 0, 0, np.arange(case.batch)).to(device)
        trainee.step(images, masks)
        with recorded(activities=[kind]) as seen:
            for _ in range(steps):
                trainee.step(images, masks)
        times = {event.key: getattr(event, spent) for event in seen.key_averages()}
        whole = sum(times.values())
        largest = sorted(times, key=lambda key: -times[key])[:10]
        rows += [{"model": case.name, "operator": key, "share": times[key] / whole} for key in largest]
    return rows


def flops(case: Case, masks: Sequence[Masks], plain: Sequence[str] = ()) -> float:
    """Of one image's matrix products, forward and backward, on the shapes that are run: the mean over masks.

    What a kernel computes twice, such as attention's scores in its backward pass, counts once.
    """
    with torch.device("meta"):  # shapes alone, no numbers
        method, images = IJEPA(case.model, case.predictor, LossConfig()), torch.zeros(1, 3, *case.model.image_size)
    return work(method, images, [mask.rows(slice(0, 1)).to(images.device) for mask in masks], plain)


def work(method: Method, images: Tensor, masks: Sequence[Masks | TokenMasks], plain: Sequence[str] = ()) -> float:
    """Operations of a step's matrix products, forward and backward: the mean over masks of the images."""
    found = []
    for mask in masks:
        with without([*plain, "the faster attention"]), FlopCounterMode(display=False) as counter:
            method(images, mask)["loss"].backward()
        found.append(counter.get_total_flops())
    return float(np.mean(found))


def matrix_peak(device: torch.device, dtype: torch.dtype, case: Case) -> float:
    """Operations a second of the best of several matrix products: a large square one, and the two of the encoder's MLP."""
    side = 8192 if device.type == "cuda" else 2048
    tokens, width = case.batch * case.model.grid[0] * case.model.grid[1], case.model.dim
    best = 0.0
    for m, k, n in ((side, side, side), (tokens, width, 4 * width), (tokens, 4 * width, width)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        for _ in range(12):
            start = now(device)
            a @ b
            best = max(best, 2 * m * k * n / (now(device) - start))
    return best


# ---------------------------------------------------------------- the released algorithm as its notes describe it


def other_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout = None) -> Tensor:
    """The kernel that ours does not take: torch's fused one, or matrix products and a softmax, nothing fused."""
    if isinstance(layout, Shared):
        return shared_attention(q, k, v, layout)
    if q.device.type == "cpu" and layers.short(q):
        return F.scaled_dot_product_attention(q, k, v)
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def embeds_all(self: PatchEmbed, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Every patch is embedded, then some are kept."""
    tokens = F.linear(patchify(images, self.proj.kernel_size[0]), self.proj.weight.flatten(1), self.proj.bias)
    return tokens if visible is None else take(tokens, visible)


def whole_block(self: Block, x: Tensor, layout: Layout = None, last: int | None = None) -> Tensor:
    """The predictor's final block computes the context's tokens, too."""
    x = block_forward(self, x, layout)
    return x if last is None else x[:, -last:]


block_forward = Block.forward
PLAIN: dict[str, tuple[Any, str, Any] | None] = {  # a technique, and what stands in its place
    "the faster attention": (layers, "attention", other_attention),
    "embedding the visible alone": (PatchEmbed, "forward", embeds_all),
    "a final block of targets alone": (Block, "forward", whole_block),
    "fused updates": None,  # of optimiser and target encoder: see Variant
}


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Some techniques replaced by the plain way."""
    with ExitStack() as stack:
        for place in filter(None, map(PLAIN.get, names)):
            stack.enter_context(patch.object(*place))
        yield

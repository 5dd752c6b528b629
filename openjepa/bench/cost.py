"""`openjepa bench scaling`, `batches`, `iteration` and `start`: what a step costs as it grows, and what comes before the first."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median, stdev
from typing import Any

import numpy as np
import torch

from openjepa.bench.clock import Rows, spread
from openjepa.bench.train import MASKS, Case, Trainee, Variant, flops, work
from openjepa.engine.device import pick_device, pick_precision
from openjepa.errors import UserError, last_line
from openjepa.masking import MaskingConfig, sample
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig
from openjepa.recipes.methods import METHODS
from openjepa.recipes.named import RECIPES
from openjepa.recipes.recipe import Recipe

BASE = Case(
    "", ViTConfig(size="Ti", image_size=(32, 32), patch_size=4, depth=6), PredictorConfig(width=96, depth=3), 32
)


def along() -> dict[str, list[tuple[int, Case]]]:
    """The base case with one thing changed: images a step, patches an image, the encoder's width (the predictor half of it)."""
    model = BASE.model
    return {
        "batch": [(n, replace(BASE, batch=n)) for n in (8, 16, 32, 64, 128)],
        "tokens": [
            ((side // 4) ** 2, replace(BASE, model=replace(model, image_size=(side, side)))) for side in (24, 32, 48, 64, 96)
        ],
        "width": [
            (w, replace(BASE, model=replace(model, width=w, heads=w // 64), predictor=PredictorConfig(width=w // 2, depth=3)))
            for w in (64, 128, 256, 512, 1024)
        ],
    }  # fmt: skip


def scaling(steps: int = 6, warmup: int = 2) -> Rows:
    """Seconds of a step, and of an operation, as the batch, the image or the network grows."""
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    rows: Rows = []
    for axis, cases in along().items():
        for value, case in cases:
            masks = [sample(MaskingConfig(), case.model.grid, 0, s, np.arange(case.batch)) for s in range(MASKS)]
            images = torch.randn(case.batch, 3, *case.model.image_size, device=device)
            trainee = Trainee(Variant("", case, precision), device)
            for s in range(warmup + steps):
                trainee.step(images, masks[s % MASKS].to(device))
            taken, work = trainee.seconds[warmup:], flops(case, masks) * case.batch
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    **spread(taken),
                    "gflop": work / 1e9,
                    "gflops": work / median(taken) / 1e9,
                }
            )
    return rows


GIANTS = (
    Case("ViT-H/14", ViTConfig(size="H", patch_size=14), PredictorConfig(depth=12), 128),
    Case("ViT-G/16", ViTConfig(size="G"), PredictorConfig(depth=16), 128),
)


def iteration(steps: int = 4) -> Rows:
    """Operations of an image's step, forward and backward, by the published recipes, and I-JEPA's over MAE's of the same size.

    Contexts are those of whole batches, 2,048 images; each method's own encoder, decoder and number of patches.
    """
    rows: Rows = []
    for size in ("b16", "l16", "h14"):
        found = {method: operations(RECIPES[f"{method}_vit{size}"](), steps) for method in ("mae", "ijepa")}
        rows += [
            {"recipe": f"{method}_vit{size}", "GFLOP": count / 1e9, "over MAE's": count / found["mae"]}
            for method, count in found.items()
        ]
    return rows


def operations(recipe: Recipe, steps: int) -> float:
    """Of one image's matrix products in a step of a method of one view, the mean over steps."""
    family, slots = METHODS[recipe.method], np.arange(recipe.data.batch_size)
    masks = [
        family.views(recipe).masks(recipe.seed, s, slots, slots[:1]).to(torch.device("meta")) for s in range(steps)
    ]
    with torch.device("meta"):  # shapes alone, no numbers
        method, images = family.build(recipe), torch.zeros(1, recipe.model.channels, *recipe.model.image_size)
    return work(method, images, masks)


FEW = (
    4,
    8,
    16,
    32,
    64,
    128,
)  # images a device: what the paper's batch of 2048 leaves each of 512, 256, 128, ... devices


def batches(steps: int = 3 * MASKS, warmup: int = 3) -> Rows:
    """Seconds and memory of a step of the two largest, as the images that a device holds become few; for `bench fleet`."""
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    rows: Rows = []
    for case in GIANTS:
        trainee = Trainee(Variant(precision, case, precision), device)
        for count in FEW:
            drawn = [sample(MaskingConfig(), case.model.grid, 0, s, np.arange(count)) for s in range(MASKS)]
            masks = [mask.to(device) for mask in drawn]
            images = torch.randn(count, 3, *case.model.image_size, device=device)
            trainee.forget()
            for s in range(warmup + steps):
                trainee.step(images, masks[s % MASKS])
            for mask in masks:
                trainee.step(images, mask, apart=True)
            taken = trainee.seconds[warmup:]
            rows.append(
                {
                    "model": case.name,
                    "variant": precision,
                    "batch": count,
                    **spread(taken),
                    "deviation": stdev(b / a for a, b in zip(taken, taken[MASKS:], strict=False))
                    / 2**0.5,  # of equal masks
                    **{f"{part}_s": median(times) for part, times in trainee.parts.items()},
                    **trainee.most_memory(images, masks),
                }
            )
    return rows


RUN = [
    "pretrain",
    "--recipe",
    "ijepa_scenes",
    "--data",
    "scenes:64",
    "--schedule.epochs",
    "0.5",
    "--schedule.warmup_epochs",
    "0",
]


def start(repeats: int = 3) -> Rows:
    """Seconds from nothing to the end of the first step of a tiny model, beside those that importing torch takes."""

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # imports are compiled once

    def taken(words: Sequence[str], until: str = "", **more: str) -> float:
        """Seconds to the line that begins so, or to the end."""
        began, found, said = time.perf_counter(), 0.0, ""
        run = subprocess.Popen([sys.executable, "-u", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=environment | more)  # fmt: skip
        assert run.stdout
        for line in run.stdout:
            said += line
            if until and not found and line.startswith(until):
                found = time.perf_counter() - began
        if run.wait():
            raise UserError(f"the run failed: {last_line(said)}")
        return found or time.perf_counter() - began

    def run(*more: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = ["-c", "from openjepa.cli import main; main()", *RUN, "--out", f"{folder}/run", *more]
            return taken(words, "step 1/1", TORCHINDUCTOR_CACHE_DIR=f"{folder}/compiled")  # nothing was compiled before

    seconds: dict[str, list[float]] = {"import torch": [], "first step": [], "first step, compiled": []}
    for repeat in range(1 + repeats):
        found = taken(["-c", "import torch"]), run(), run("--machine.compile", "true")
        for what, each in zip(seconds, found, strict=True):
            seconds[what] += [each] if repeat else []  # the first warms up
    torch_alone = median(seconds["import torch"])
    return [row(what, found, torch_alone) for what, found in seconds.items()]


def row(what: str, seconds: list[float], torch_alone: float) -> dict[str, Any]:
    return {"what": what, **spread(seconds), "beyond_import_s": median(seconds) - torch_alone}

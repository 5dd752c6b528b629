"""`openjepa bench fleet`: the two largest models on 1, 8, 64 and 512 H100s, planned by arithmetic and played by a simulation.

A step on one device is measured (`openjepa bench batches`, read from a results file), sizes are counted from shapes, and what
nobody here can measure is an assumption in one table. docs/scaling.md says what follows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from openjepa.bench.clock import Rows
from openjepa.bench.train import MASKS
from openjepa.errors import UserError, first_line
from openjepa.masking import MaskingConfig, Masks, sample
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models import layers
from openjepa.recipes.ijepa import ijepa_vitg16_in22k, ijepa_vith14
from openjepa.recipes.recipe import Recipe

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "h100.json"  # of a checkout
DEVICES = (1, 8, 64, 512)
AT_ONCE = 128  # images that a device takes through the network at a time; more are accumulated


@dataclass(frozen=True)
class Input:
    """A number that the plan rests on."""

    value: float
    unit: str
    source: str


INPUTS = {
    "devices a node": Input(8, "", "data sheet, DGX H100"),
    "NVLink": Input(450, "GB/s each way, a device", "data sheet, H100 SXM"),
    "network": Input(50, "GB/s each way, a device", "data sheet, DGX H100: 8 ports of 400 Gb/s"),
    "line rate reached": Input(0.8, "", "assumed"),
    "latency of a hop": Input(10, "µs", "assumed, between nodes"),
    "bucket": Input(26.2, "MB", "torch's DDP: 25 MiB"),
    "jitter": Input(0.02, "of a step, a device", "assumed: standard deviation between devices"),
    "pauses": Input(1e-4, "a step and device", "assumed, each of 50 ms; in the simulation alone"),
    "ImageNet-1k": Input(115.4, "kB an image", "the archive: 147.9 GB, 1,281,167 images"),
    "ImageNet-22k": Input(92.3, "kB an image", "the archive: 1.31 TB, 14,197,122 images"),
    "cores": Input(112, "a node", "data sheet, DGX H100"),
    "decoding": Input(817, "images/s, a core", "measured, 55 kB photographs: `openjepa bench data`, xeon-2-cores.json"),
    "copying a checkpoint": Input(5, "GB/s, a device", "assumed: to host memory that is not pinned"),
    "writing a checkpoint": Input(2, "GB/s, all ranks", "assumed"),
    "SHA-256": Input(
        1.7, "GB/s, one core", "measured, 256 MB, on the same Xeon: `openjepa bench checksum`; 1.6 on an EPYC"
    ),
    "time between failures": Input(50_700, "h, a device", "Llama 3 report: 419 stops in 54 days of 16,384 H100s"),
    "restart": Input(600, "s", "assumed: notice, start again, read the checkpoint"),
}


def given(name: str) -> float:
    return INPUTS[name].value


@dataclass(frozen=True)
class Job:
    """A recipe on its data set."""

    name: str
    recipe: Recipe
    images: int  # of an epoch
    image_kb: float  # as it lies there


JOBS = (
    Job("ViT-H/14", ijepa_vith14(), 1_281_167, given("ImageNet-1k")),
    Job("ViT-G/16", ijepa_vitg16_in22k(), 14_197_122, given("ImageNet-22k")),
)


# ---------------------------------------------------------------- what one device does and holds


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step on one device."""

    forward: float
    backward: float
    update: float  # optimiser and moving average: once a step, however many images


def measured(file: Path, model: str) -> dict[int, Step]:
    """By the number of images. Raises UserError for a file without `bench batches`."""
    try:
        rows = json.loads(file.read_text())["batches"]["rows"]
        mine = [row for row in rows if row["model"] == model]
        forward = ("target_encoder_s", "context_encoder_s", "predictor_s")
        return {
            row["batch"]: Step(sum(row[part] for part in forward), row["backward_s"], row["optimizer_s"] + row["ema_s"])
            for row in mine
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} holds no steps to plan with ({first_line(error)}): run openjepa bench batches --out FILE on a GPU, "
            "then bench fleet --data FILE"
        ) from error


def between(steps: dict[int, Step], images: float) -> Step:
    """On a straight line between the nearest that were measured."""
    at = sorted(steps)
    return Step(*(float(np.interp(images, at, [vars(steps[n])[p] for n in at])) for p in vars(steps[at[0]])))


@dataclass(frozen=True)
class Sizes:
    """Bytes, counted from the shapes."""

    learning: int  # parameters with a gradient, not bytes
    following: int  # the target encoder's
    blocks: int  # that learn
    copies: int  # bf16 weights kept for the backward pass
    activations: int  # kept for it, an image

    @property
    def checkpoint(self) -> int:
        """float32: weights, and two moments of what learns."""
        return 4 * (3 * self.learning + self.following)

    @property
    def state(self) -> int:
        """A checkpoint's, and the gradient."""
        return self.checkpoint + 4 * self.learning

    def memory(self, images: float, shards: int = 1) -> float:
        """Of one device. Sharded (FSDP2), the copies of two blocks are there at a time."""
        copies = self.copies if shards == 1 else 2 * self.copies / self.blocks
        return self.state / shards + copies + images * self.activations

    @property
    def gradient(self) -> int:
        return 4 * self.learning

    def gathered(self, parts: int) -> float:
        """Bytes that FSDP2 brings to a device in a step: bf16 weights for every pass, the gradient's sum in float32."""
        return parts * 2 * (2 * self.learning + self.following) + self.gradient


@cache
def sizes(recipe: Recipe) -> Sizes:
    """Whatever autograd keeps in a step under bf16 autocast, on tensors without contents: of 2 images and of 4."""
    method = shaped(recipe)
    drawn = [sample(MaskingConfig(), recipe.model.grid, 0, s, np.arange(AT_ONCE)) for s in range(MASKS)]
    largest = max(drawn, key=lambda m: m.context.shape[-1])
    two, four = kept(recipe, largest, 2), kept(recipe, largest, 4)
    return Sizes(
        sum(p.numel() for p in method.parameters() if p.requires_grad),
        sum(p.numel() for p in method.target_encoder.parameters()),
        recipe.model.n_blocks + recipe.predictor.depth,
        2 * two - four,
        (four - two) // 2,
    )


def shaped(recipe: Recipe) -> IJEPA:
    """The method without contents."""
    with torch.device("meta"):
        return IJEPA(recipe.model, recipe.predictor, LossConfig())


def kept(recipe: Recipe, masks: Masks, images: int) -> int:
    """Bytes that the backward pass needs beside the parameters; attention by its fused kernel, as on a GPU."""
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    method, masks = shaped(recipe), masks.rows(slice(0, images))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        method = method.to_empty(device="cpu")
        own = {t.untyped_storage()._cdata for t in (*method.parameters(), *method.buffers())}
        fake = replace(masks, context=mode.from_tensor(masks.context), targets=mode.from_tensor(masks.targets))
        with (
            patch.object(layers, "attention", lambda q, k, v, _=None: F.scaled_dot_product_attention(q, k, v)),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            method(torch.empty(images, 3, *recipe.model.image_size), fake)
    return sum(storage.nbytes() for address, storage in seen.items() if address not in own)


# ---------------------------------------------------------------- the plan


def buckets(gradient: float, devices: int) -> tuple[int, float]:
    """How many all-reduces a step's gradient takes, and the seconds of each: a ring whose slowest link counts."""
    count = math.ceil(gradient / (given("bucket") * 1e6))
    if devices == 1:
        return count, 0.0
    nodes = devices / given("devices a node")
    link = (
        given("NVLink") if nodes <= 1 else given("network") * given("devices a node")
    )  # all ports of a node take part
    moved = 2 * gradient / count * (devices - 1) / devices
    hops = 2 * math.ceil(math.log2(nodes)) if nodes > 1 else 0  # a tree's: there and back
    return count, moved / (link * 1e9 * given("line rate reached")) + hops * given("latency of a hop") * 1e-6


def saving(job: Job, epoch_s: float) -> tuple[float, float]:
    """Seconds that a checkpoint stops the training for, and that it takes to be whole."""
    gigabytes = sizes(job.recipe).checkpoint / 1e9
    copied = gigabytes / given("copying a checkpoint")
    behind = gigabytes / given("writing a checkpoint") + gigabytes / given("SHA-256")  # rank 0 reads and sums all files
    return copied + max(0.0, behind - epoch_s), copied + behind  # the next save waits for the one before


def plan(job: Job, steps: dict[int, Step], devices: int, batch: int) -> dict[str, Any]:
    """Seconds of a step by what they are spent on, and what it takes of memory, network and storage."""
    size, images = sizes(job.recipe), batch / devices
    parts = math.ceil(images / AT_ONCE)
    one, whole = between(steps, images / parts), between(steps, AT_ONCE)
    compute = parts * (one.forward + one.backward)
    for_images = images / AT_ONCE * (whole.forward + whole.backward)
    deviations = NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))  # of the slowest of so many (Blom, 1958)
    slowest = deviations * given("jitter") * compute / math.sqrt(parts)
    count, each = buckets(size.gradient, devices)
    exposed = max(each, count * each - one.backward * (1 - 1 / count))  # the last bucket has nothing to hide behind
    busy = compute + slowest + exposed + one.update
    data = images / (given("cores") / given("devices a node") * given("decoding"))
    step = max(busy, data)

    moved = 2 * size.gradient * (devices - 1) / devices / 1e9
    epoch = job.images / batch * step
    stop, written = saving(job, epoch)
    failing = devices / (given("time between failures") * 3600)  # a second
    useful = epoch / (epoch + stop) * (1 - failing * min(1 / failing, epoch / 2 + written + given("restart")))
    rate = batch / step * useful
    return {
        "model": job.name,
        "devices": devices,
        "batch": batch,
        "images_per_device": images,
        "images_per_s": rate,
        "step_s": step,
        "images_s": for_images,
        "few_images_s": compute - for_images,  # more than their share of a step that is full
        "update_s": one.update,
        "slowest_device_s": slowest,
        "network_s": exposed,
        "data_s": step - busy,
        "saving_failing_s": step / useful - step,
        "memory_gb": size.memory(images / parts) / 1e9,
        "fsdp_memory_gb": size.memory(images / parts, devices) / 1e9,
        "network_gb_per_step": moved,
        "network_gbit_per_s": 8 * moved / step if devices > given("devices a node") else 0.0,  # of a node, each way
        "fsdp_network_gb_per_step": size.gathered(parts) * (devices - 1) / devices / 1e9,
        "read_gb_per_s": rate * job.image_kb / 1e6,
        "decoding_cores": rate / given("decoding"),
        "checkpoint_gb": size.checkpoint / 1e9,
        "checkpoint_every_s": epoch,
        "checkpoint_s": written,
        "days": job.recipe.schedule.epochs * job.images / rate / 86400,
    }


# ---------------------------------------------------------------- the simulation


def simulate(job: Job, steps: dict[int, Step], devices: int, batch: int, played: int = 300, seed: int = 0) -> float:
    """Images a second, of steps played device by device and bucket by bucket, and of failures drawn one by one.

    Shares with the plan the inputs and what one all-reduce and one save cost: no overlap, maximum or mean is put in.
    """
    draw = np.random.default_rng(seed)
    images = batch / devices
    parts = math.ceil(images / AT_ONCE)
    one = between(steps, images / parts)
    count, each = buckets(sizes(job.recipe).gradient, devices)
    nodes = math.ceil(devices / given("devices a node"))
    cores = given("cores") * nodes / devices
    ahead = 2  # batches that a loader holds ready
    loaded, taken, now, ended = np.zeros(devices), [np.zeros(devices)] * ahead, np.zeros(devices), []

    def took(seconds: float, jitter: float, *shape: int) -> np.ndarray:
        return seconds * draw.gamma(jitter**-2, jitter**2, shape)

    for _ in range(played):
        loaded = np.maximum(loaded, taken[0]) + took(images / (cores * given("decoding")), 0.1, devices)
        begin = np.maximum(now, loaded)
        taken = [*taken[1:], begin]
        pause = (draw.random(devices) < given("pauses")) * 0.05  # s
        passes = took(1, given("jitter"), devices, parts)
        before = begin + pause + one.forward * passes.sum(1) + one.backward * passes[:, :-1].sum(1)
        made = before[:, None] + one.backward * passes[:, -1:] * np.arange(1, count + 1) / count  # gradients, by bucket
        sent = 0.0
        for ready, seconds in zip(made.max(0), took(each, 0.1, count), strict=True):
            sent = max(sent, ready) + seconds
        now = np.full(devices, sent + one.update)
        ended.append(float(now[0]))
    step = (ended[-1] - ended[played // 10]) / (played - 1 - played // 10)

    epoch = job.images / batch * step
    stop, written = saving(job, epoch)
    gaps = draw.exponential(given("time between failures") * 3600 / devices, 20_000)
    epochs = np.floor(np.maximum(0, gaps - written + stop) / (epoch + stop))  # whose checkpoint is whole
    return float(epochs.sum() * job.images / (gaps + given("restart")).sum())


def fleet(results: str | None = None) -> Rows:
    """The paper's batch on all fleets; on those that it leaves few images each, the batch that fills them, too."""
    rows: Rows = []
    for job in JOBS:
        steps = measured(Path(results) if results else RESULTS, job.name)
        paper = job.recipe.data.batch_size
        alone = plan(job, steps, 1, paper)["images_per_s"]
        for devices, batch in [
            *((n, paper) for n in DEVICES),
            *((n, AT_ONCE * n) for n in DEVICES if AT_ONCE * n > paper),
        ]:
            row = plan(job, steps, devices, batch)
            played = simulate(job, steps, devices, batch)
            rows.append({**row, "efficiency": row["images_per_s"] / devices / alone, "simulated_images_per_s": played})
    return rows

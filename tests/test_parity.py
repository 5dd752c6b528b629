"""The parity claims: in float32 on a CPU this project computes what the released code computes, number by number."""

import json
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from openjepa.convert import released
from openjepa.convert.names import Told
from openjepa.data.stream import Batch, DataConfig
from openjepa.engine.device import pick_autocast
from openjepa.engine.monitors import MonitorsConfig, Watch
from openjepa.engine.optim import OptimConfig, Schedule, ScheduleConfig, build_optimizer
from openjepa.engine.run import Interrupted, Run
from openjepa.engine.train import train
from openjepa.masking import Masks
from openjepa.methods.ijepa import IJEPA, LossConfig
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import ViTConfig


@dataclass
class Golden:
    """The released tiny run: its numbers, and our method with its first weights."""

    about: dict
    tensors: dict[str, Tensor]
    method: IJEPA

    def masks(self, step: int) -> Masks:
        context, targets = self.tensors[f"step{step}.context"], self.tensors[f"step{step}.targets"]
        return Masks(context[:, None], targets.transpose(0, 1))

    def images(self, step: int = 0) -> Tensor:
        return self.tensors[f"step{step}.images"]


@pytest.fixture
def run(golden: Path) -> Golden:
    saved = torch.load(golden / "ijepa_tiny.pth.tar", weights_only=True)
    config = ViTConfig(size="Ti", image_size=(64, 64), patch_size=8, width=96, depth=3, heads=3)
    method = IJEPA(config, PredictorConfig(width=48, depth=2), LossConfig())
    for name, weights in released.read(saved, Told(heads=3), "golden").weights.items():
        getattr(method, name).load_state_dict(weights)
    about = json.loads((golden / "ijepa_tiny.json").read_text())
    return Golden(about, load_file(golden / "ijepa_tiny.safetensors"), method)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def holds(claim: str, errors: list[float], tolerance: float) -> None:
    """Every error below the tolerance; the largest is printed for docs/fidelity.md (pytest -s)."""
    print(f"\n| {claim} | {tolerance:.0e} | {max(errors):.1e} |")
    assert max(errors) < tolerance, claim


def test_positions(run, golden):
    stored = torch.load(golden / "ijepa_tiny.pth.tar", weights_only=True)
    pairs = [(run.method.encoder, stored["encoder"]["module.pos_embed"]),
             (run.method.predictor, stored["predictor"]["module.predictor_pos_embed"])]  # fmt: skip
    holds("positions", [error(ours.get_buffer("positions"), theirs[0]) for ours, theirs in pairs], 1e-12)


def test_the_encoder_of_whole_images(run):
    ours = run.method.target_encoder(run.images())
    holds("encoder, whole image", [error(ours, run.tensors["step0.encoder_full"])], 1e-5)


def test_the_encoder_of_visible_patches(run):
    context, _, _ = run.method.encode_context(run.images(), run.masks(0), 0)
    holds("encoder, visible patches", [error(context, run.tensors["step0.encoder_context"])], 1e-5)


def test_predictions(run):
    masks = run.masks(0)
    context, visible, _ = run.method.encode_context(run.images(), masks, 0)
    predictions = run.method.predictor(context, visible, masks.targets).transpose(0, 1).flatten(0, 1)
    holds("predictions", [error(predictions, run.tensors["step0.predictions"])], 1e-5)


def test_targets(run):
    targets = run.method.targets(run.images(), run.masks(0))
    holds("targets", [error(targets.transpose(0, 1).flatten(0, 1), run.tensors["step0.target_features"])], 1e-5)


def test_loss_and_every_gradient(run):
    loss = run.method(run.images(), run.masks(0))["loss"]
    holds("loss", [abs(loss.item() / run.about["losses"][0] - 1)], 1e-6)
    loss.backward()
    expected = {k.removeprefix("step0.grad."): v for k, v in run.tensors.items() if k.startswith("step0.grad.")}
    errors = {}
    for network in ("encoder", "predictor"):
        gradients = {n: p.grad for n, p in getattr(run.method, network).named_parameters()}
        for name, theirs in expected.items():
            part, _, parameter = name.partition(".")
            if part == network:
                errors[name] = error(gradients[released.own_name(network, parameter)], theirs)
    assert len(errors) == len(expected) == sum(p.requires_grad for p in run.method.parameters())
    holds(f"gradients, all {len(errors)}", list(errors.values()), 1e-5)


def test_ten_steps_of_our_engine(run, tmp_path):
    about = run.about
    optim = OptimConfig()  # the released values: lr 2e-4 to 1e-3 to 1e-6, weight decay 0.04 to 0.4
    schedule = Schedule(optim, ScheduleConfig(epochs=about["epochs"], warmup_epochs=1, ema=(0.996, 1.0)), about["ipe"])
    losses: list[float] = []
    folder = Run(tmp_path, 1, Console(quiet=True))
    batches = (Batch(run.images(step), run.masks(step), np.arange(6)) for step in range(10))

    def forward(batch: Batch) -> dict[str, Tensor]:
        out = run.method(batch.images, batch.masks)
        losses.append(out["loss"].item())
        folder.signal = signal.SIGINT if len(losses) == 10 else 0
        return out

    device = torch.device("cpu")
    watch = Watch(
        folder,
        MonitorsConfig(),
        schedule,
        run.method,
        DataConfig(batch_size=6),
        30,
        device,
        lambda batch: run.method.product(batch.images),
        None,
    )
    optimizer, fp32 = build_optimizer(run.method, optim), pick_autocast("fp32", device)
    with folder, pytest.raises(Interrupted):
        train(run.method, batches, optimizer, schedule, folder, watch, forward=forward, accumulating=lambda last: nullcontext(),
              autocast=fp32, save_every=10, seed=0)  # fmt: skip
    holds("ten steps: losses", [abs(a / b - 1) for a, b in zip(losses, about["losses"], strict=True)], 1e-4)
    final = {k.removeprefix("final."): v for k, v in run.tensors.items() if k.startswith("final.")}
    errors = {}
    for name, theirs in final.items():
        network, _, parameter = name.partition(".")
        if "pos_embed" not in parameter:
            own = released.own_name(network, parameter)
            errors[name] = error(getattr(run.method, network).state_dict()[own], theirs)
    learned = sum(
        len(getattr(run.method, network).state_dict()) for network in ("encoder", "predictor", "target_encoder")
    )
    assert len(errors) == learned
    holds("ten steps: weights of all three networks", list(errors.values()), 1e-4)

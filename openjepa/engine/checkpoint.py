"""Checkpoints: written to a sibling folder, flushed, then renamed; whole or not there at all.

RUN/checkpoints/step-00001000/ holds weights.safetensors (all three networks), optimizer.safetensors and state.json
(step, counters, environment). All randomness is a function of (seed, step), so there is no generator to save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from openjepa.errors import UserError
from openjepa.models.weights import load_strict


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    def state(self) -> dict[str, Any]:
        with reading(self.path / "state.json") as file:
            loaded: dict[str, Any] = json.loads(file.read_text())
            return loaded

    def weights(self) -> dict[str, Tensor]:
        with reading(self.path / "weights.safetensors") as file:
            return load_file(file)

    def optimizer(self) -> dict[str, Tensor]:
        with reading(self.path / "optimizer.safetensors") as file:
            return load_file(file)


@contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Turns whatever a damaged file raises into one line that names it."""
    try:
        yield file
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {file.parent} is damaged ({file.name}: {error}): move it away to go on from the one before"
        ) from error


def checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return [Checkpoint(path) for path in found if re.fullmatch(r"step-\d+", path.name)]


def locate(path: Path) -> tuple[Path, Checkpoint]:
    """The run and the checkpoint that a path names: a run's newest, or the very one of a checkpoint folder.

    Raises UserError if there is none.
    """
    path = path.absolute()
    for found in checkpoints(path.parent.parent) if path.parent.name == "checkpoints" else []:
        if found.path.name == path.name:
            return path.parent.parent, found
    if not (path / "recipe.yaml").exists():
        raise UserError(f"{path} is not a run: it has no recipe.yaml")
    if not (all_here := checkpoints(path)):
        raise UserError(f"{path} has no checkpoint yet: run openjepa pretrain --out {path}")
    return path, all_here[-1]


def save(run: Path, step: int, method: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises UserError if it cannot be written; those before it are untouched.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    part = final.with_suffix(".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in method.state_dict().items()}, part / "weights.safetensors")
        save_file(optimizer_state(method, optimizer), part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        for file in part.iterdir():
            flush(file)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        older = checkpoints(run)
        kept = f"the one of step {older[-1].step} is intact" if older else "there is no older one"
        raise UserError(
            f"cannot write the checkpoint of step {step} to {final.parent} ({error}); {kept}: "
            "free some space and run the same command"
        ) from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old.path)


def flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore(checkpoint: Checkpoint, method: nn.Module, optimizer: Optimizer) -> None:
    """Load weights and optimiser state, strictly. Raises UserError naming what does not fit."""
    load_strict(method, checkpoint.weights(), str(checkpoint.path))
    saved = checkpoint.optimizer()
    anew = checkpoint.state().get("anew", [])  # what an imported checkpoint did not hold
    for name, parameter in learning(method):
        entries = {k.rpartition("/")[2]: v for k, v in saved.items() if k.startswith(f"{name}/")}
        if not entries and (checkpoint.step == 0 or name in anew):  # no step was taken on it yet
            continue
        if not entries:
            raise UserError(f"checkpoint {checkpoint.path} has no optimiser state for {name}")
        optimizer.state[parameter] = {
            k: v if k == "step" and parameter.device.type == "cpu" else v.to(parameter.device)
            for k, v in entries.items()
        }


def learning(method: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in method.named_parameters() if p.requires_grad]


def optimizer_state(method: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Optimiser tensors under their parameters' names: `encoder.norm.weight/exp_avg`."""
    return {
        f"{name}/{key}": torch.as_tensor(value).contiguous()
        for name, parameter in learning(method)
        for key, value in optimizer.state[parameter].items()
    }

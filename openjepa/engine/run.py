"""The folder of a run: recipe, log, progress, checkpoints, and what a signal means.

RUN/recipe.yaml          the resolved recipe
RUN/data.json            what it trains on, with a fingerprint
RUN/metrics.jsonl        one line each time something is logged
RUN/bad_images.txt       images that could not be read
RUN/tensorboard/         the same numbers as curves
RUN/checkpoints/         see checkpoint.py
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from openjepa.data.stream import Bad
from openjepa.engine import checkpoint
from openjepa.engine.checkpoint import Checkpoint
from openjepa.engine.whole import write_whole
from openjepa.errors import UserError

INTERRUPTED = 130  # exit status after Ctrl-C


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where it runs. Changes no result on the same hardware."""

    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes a GPU if there is one
    workers: int = 0  # processes that load images
    compile: bool = False  # torch.compile the method
    checkpoint_every: float = 1  # epochs
    keep: int = 2  # newest checkpoints that stay
    wandb: str | None = None  # Weights & Biases project to log to

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"machine.workers is {self.workers}: it must not be negative")
        if self.checkpoint_every <= 0 or self.keep < 1:
            raise UserError("machine.checkpoint_every must be above 0 and machine.keep at least 1")


class Interrupted(Exception):
    """The run stopped between two steps because it was asked to; its checkpoint is written."""


class Run:
    """Use as a context manager: signals then mean "finish the step, write a checkpoint, stop"."""

    def __init__(self, path: Path, keep: int, console: Console) -> None:
        self.path, self.keep, self.console = path, keep, console
        found = checkpoint.checkpoints(path)
        self.resumed: Checkpoint | None = found[-1] if found else None
        self.step = self.resumed.step if self.resumed else 0
        self.bad: dict[str, str] = self.resumed.state().get("bad_images", {}) if self.resumed else {}
        self.stopping = False
        self._metrics: TextIO | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Run:
        self._trim_metrics()
        self._metrics = open(self.path / "metrics.jsonl", "a")
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._metrics:
            self._metrics.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            os._exit(128 + number)
        self.stopping = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def _trim_metrics(self) -> None:
        """Forget what was logged after the checkpoint that we go on from."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= self.step]
            write_whole(file, "".join(json.dumps(record) + "\n" for record in kept))

    def open_boards(self, wandb_project: str | None) -> None:
        """TensorBoard, and Weights & Biases when asked for."""
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=self.step or None)
        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise UserError("machine.wandb needs the extra: pip install 'openjepa[wandb]'") from error
            self._wandb = wandb.init(project=wandb_project, dir=str(self.path), name=self.path.name, resume="allow")

    def log(self, step: int, values: dict[str, float], line: str | None = None) -> None:
        """Write numbers to every log; `line` is what a person sees."""
        assert self._metrics is not None
        record = {"step": step, **{k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in values.items()}}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)
        if line:
            self.console.print(line, highlight=False, markup=False)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def note_bad(self, bad: list[Bad], limit: float, images: int) -> None:
        """Count and name unreadable images; stop when they are too many.

        Raises UserError when more than the share `limit` of all `images` is bad.
        """
        new = {b.name: b.reason for b in bad if b.name not in self.bad}
        if not new:
            return
        self.bad |= new
        lines = [f"{name}\t{reason}\n" for name, reason in self.bad.items()]
        (self.path / "bad_images.txt").write_text("".join(lines))
        for name, reason in new.items():
            self.warn(f"unreadable image {name} ({reason}); the next one takes its place")
        if len(self.bad) > limit * images:
            name, reason = next(iter(self.bad.items()))
            raise UserError(
                f"{len(self.bad)} of {images} images are unreadable, more than data.max_bad = {limit:g} allows; the first is "
                f"{name} ({reason}), all are in {self.path / 'bad_images.txt'}"
            )

    def save(self, step: int, method: nn.Module, optimizer: Optimizer) -> None:
        state = {"bad_images": self.bad, "environment": environment()}
        checkpoint.save(self.path, step, method, optimizer, state, self.keep)
        self.step = step


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, less the torn last line of a killed one."""
    records = []
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            records.append(json.loads(line))
    return records


def environment() -> dict[str, str | int]:
    """What the numbers depend on besides the recipe."""
    from openjepa import __version__

    return {
        "openjepa": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def cpu_name() -> str:
    """Its maker's name where the system tells it, and how many cores this process has."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return f"{name}, {len(os.sched_getaffinity(0))} cores"
    return platform.processor() or platform.machine()


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

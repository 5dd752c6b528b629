"""The folder of a run: recipe, log, progress, checkpoints, and what a signal means.

RUN/recipe.yaml          the resolved recipe
RUN/data.json            what it trains on, with a fingerprint
RUN/metrics.jsonl        one line each time something is logged
RUN/bad_images.txt       images that could not be read
RUN/bad_steps.txt        steps whose loss or gradient was not finite
RUN/tensorboard/         the same numbers as curves
RUN/checkpoints/         see checkpoint.py

Of several ranks the first alone writes, all but the checkpoints.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from openjepa.data.workers import SIGNALS
from openjepa.engine import checkpoint, parallel
from openjepa.engine.checkpoint import Checkpoint, Saver
from openjepa.engine.parallel import Strategy
from openjepa.engine.whole import write_whole
from openjepa.errors import UserError
from openjepa.models.layers import Recompute

BAD_STEPS = "bad_steps.txt"
INTERRUPTED = 130  # exit status after Ctrl-C
REQUEUE = 75  # after the other signals: EX_TEMPFAIL, "try again", for schedulers that requeue by exit status


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """Where it runs. Changes no result on the same hardware."""

    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes a GPU if there is one
    workers: int | None = None  # processes that load images; null: beside a GPU its share of the cores, else none
    read_mb_s: float | None = None  # megabytes a second that a rank and its workers read from a store at most
    compile: bool = False  # torch.compile the method
    strategy: Strategy = "ddp"  # over several processes: each holds all, or fsdp: each a share of every parameter
    recompute: Recompute = "none"  # activations in backward: selective all but matrix products and attention, or full
    patience_s: float = 600  # that a step may take before the process it waits for is named and the job ends
    checkpoint_every: float = 1  # epochs
    keep: int = 2  # newest checkpoints that stay
    keep_every: float = 0  # epochs between checkpoints that stay for good; 0 none
    wandb: str | None = None  # Weights & Biases project to log to

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UserError(f"machine.workers is {self.workers}: it must not be negative")
        if self.read_mb_s is not None and self.read_mb_s <= 0:
            raise UserError(f"machine.read_mb_s is {self.read_mb_s:g}: it must be above 0, or null for as many as come")
        if self.checkpoint_every <= 0 or self.keep < 1 or self.keep_every < 0 or self.patience_s <= 0:
            raise UserError(
                "machine.checkpoint_every and machine.patience_s must be above 0, machine.keep at least 1, machine.keep_every "
                "not negative"
            )


class Interrupted(Exception):
    """The run stopped between two steps because it was asked to; its checkpoint is written.

    status: what the process is to exit with.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Run:
    """Use as a context manager: signals then mean "finish the step, write a checkpoint, stop"."""

    def __init__(self, path: Path, keep: int, console: Console, keep_every: int = 0) -> None:
        """keep, keep_every: as Saver has them."""
        self.path, self.console = path, console
        self.main = parallel.rank() == 0
        self.saver = Saver(path, keep, keep_every)
        found = checkpoint.checkpoints(path)
        self.resumed: Checkpoint | None = found[-1] if found else None
        self.step = self.resumed.step if self.resumed else 0
        state = self.resumed.state() if self.resumed else {}
        self.bad: dict[str, str] = state.get("bad_images", {})
        self.skipped: int = state.get("skipped_steps", 0)  # steps that were not finite
        self.signal = 0  # that this process was sent
        self.stopping: int | None = None  # the exit status, once all ranks know that one of them was
        self._lock: int | None = None
        self._metrics: TextIO | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Run:
        """Raises UserError where another process is training in the same folder."""
        if self.main:
            self._lock = alone(self.path)
            self._trim()
            self._metrics = open(self.path / "metrics.jsonl", "a")
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.saver.wait()
        finally:
            self.saver.close()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._metrics:
                self._metrics.close()
            if self._lock is not None:
                os.close(self._lock)
            if self._board:
                self._board.close()
            if self._wandb:
                self._wandb.finish()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if self.main:
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def wishes(self) -> tuple[float, float]:
        """Whether this process wants the run to stop for good, and to stop and be started again."""
        return float(self.signal == signal.SIGINT or self.saver.trouble), float(self.signal not in (0, signal.SIGINT))

    def heed(self, wishes: tuple[float, float]) -> None:
        """wishes: means over all ranks; one that wants to stop is enough."""
        if any(wishes) and self.stopping is None:
            self.stopping = REQUEUE if wishes[1] else INTERRUPTED

    def _trim(self) -> None:
        """Forget what was logged after the checkpoint that we go on from: it will be again."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= self.step]
            write_whole(file, "".join(json.dumps(record) + "\n" for record in kept))
        file = self.path / BAD_STEPS
        if file.exists():
            lines = [line.partition("\t") for line in file.read_text().splitlines(keepends=True)]
            known = ["".join(line) for line in lines if line[0].isdecimal() and int(line[0]) <= self.step]
            write_whole(file, "".join(known))

    def open_boards(self, wandb_project: str | None) -> None:
        """TensorBoard, and Weights & Biases when asked for."""
        if not self.main:
            return
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
        if self._metrics is None:
            return
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
        if self.main:
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

    def note_bad_step(self, step: int, loss: float, norm: float, images: list[str]) -> None:
        """Count and name a step that changed nothing, because its loss or its gradient was not finite."""
        self.skipped += 1
        whose = ", ".join(images[:8]) + (f" and {len(images) - 8} more" if len(images) > 8 else "")
        about = f"loss {loss:g}, gradient norm {norm:g}; images: {whose}"
        self.warn(f"step {step} is not finite and was skipped ({about})")
        if self.main:
            with open(self.path / BAD_STEPS, "a") as file:
                file.write(f"{step}\t{loss:g}\t{norm:g}\t{', '.join(images)}\n")

    def save(self, step: int, method: nn.Module, optimizer: Optimizer) -> None:
        """Begin to write a checkpoint. Raises UserError if the one before could not be written."""
        state = {"bad_images": self.bad, "skipped_steps": self.skipped, "environment": environment()}
        self.saver.save(step, method, optimizer, state)


def alone(run: Path) -> int:
    """Take a run for this process, until the descriptor that is returned is closed. Raises UserError if another has it."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is training in {run}: wait for it, or choose another --out") from error
    except OSError:  # a file system without locks
        pass
    return descriptor


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
        cores = len(os.sched_getaffinity(0))
        return f"{name}, {cores} core{'s' * (cores > 1)}"
    return platform.processor() or platform.machine()


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

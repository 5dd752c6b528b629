"""Checkpoints: written beside the training to a sibling folder, flushed, then renamed; whole or not there at all.

RUN/checkpoints/step-00001000/ holds weights.safetensors (all networks), optimizer.safetensors (each in pieces, weights-00001
…, where several ranks wrote), state.json (step, counters, environment) and checksums.txt, which `sha256sum -c` reads. Tensors
go through torch.distributed.checkpoint, so any number of ranks under any strategy reads what any other wrote; its files are
safetensors here, never pickles. All randomness is a function of (seed, step), so there is no generator to save.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from openjepa.engine import parallel
from openjepa.engine.whole import flush, remove_folder
from openjepa.errors import UserError, first_line
from openjepa.models.weights import check_fit

T = TypeVar("T")
CHECKSUMS = "checksums.txt"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is no reason to warn


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    def state(self) -> dict[str, Any]:
        self.verify(self.files("state.json"))
        with self.reading("state.json"):
            loaded: dict[str, Any] = json.loads((self.path / "state.json").read_text())
            return loaded

    def weights(self) -> dict[str, Tensor]:
        """Every weight, whole, by name."""
        return self.tensors("weights")

    def optimizer(self) -> dict[str, Tensor]:
        """The optimiser's tensors, whole, by their parameters' names: `encoder.norm.weight/exp_avg`."""
        return self.tensors("optimizer")

    def tensors(self, kind: str) -> dict[str, Tensor]:
        self.verify(self.files(kind))
        known = {k: v for k, v in self.shapes().items() if is_optimizer(k) == (kind == "optimizer")}
        found = {name: torch.empty_like(shape, device="cpu") for name, shape in known.items()}
        self.load(found, together=False)
        return found

    def files(self, kind: str = "") -> list[str]:
        """The names of its files, of one kind unless of all. Raises UserError where one is missing."""
        names = [f.name for f in self.path.iterdir() if f.name != CHECKSUMS]
        found = sorted({*names, *self.checksums()})
        if missing := [name for name in found if name not in names]:
            raise self.damaged(missing[0], "it is missing")
        return [name for name in found if name.startswith(kind)]

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each file. Raises UserError where there are none."""
        with self.reading(CHECKSUMS):
            lines = (self.path / CHECKSUMS).read_text().splitlines()
            return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

    def verify(self, names: list[str]) -> None:
        """Raises UserError naming the first of these files that is not what was written."""
        known = self.checksums()
        for name in names:
            with self.reading(name):
                if sha256(self.path / name) != known.get(name):
                    raise ValueError("its checksum is another than when it was written")

    def shapes(self) -> dict[str, Tensor]:
        """Its tensors without their contents, from the files' headers."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        for name in self.files():
            if name.endswith(".safetensors"):
                file = self.path / name
                with (
                    self.reading(name),
                    open(file, "rb"),
                    safe_open(file, framework="pt"),
                ):  # the first says what is closed
                    pass
        with self.reading("*.safetensors"):
            known = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
            return {k: torch.empty(v.size, dtype=v.properties.dtype, device="meta") for k, v in known.items()}  # type: ignore[union-attr]

    def load(self, into: dict[str, Tensor], together: bool) -> None:
        """Fill tensors, whole or sharded, in place. together: all ranks do it, each for what it holds."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with self.reading("*.safetensors"):
            load(into, storage_reader=HuggingFaceStorageReader(str(self.path)), no_dist=not together)

    def damaged(self, file: str, reason: str) -> UserError:
        return UserError(
            f"checkpoint {self.path} is damaged ({file}: {reason}): move it away to go on from the one before"
        )

    @contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Turns whatever a damaged file raises into one line that names it."""
        try:
            yield
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self.damaged(file, first_line(error)) from error
        except Exception as error:
            if reason := storage_failure(error):
                raise self.damaged(file, reason) from error
            raise


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


# ---------------------------------------------------------------- writing


class Saver:
    """Writes a run's checkpoints while it goes on, one at a time; on every rank, each its share."""

    def __init__(self, run: Path, keep: int, keep_every: int = 0) -> None:
        """keep: newest that stay; keep_every: steps between those that stay for good, 0 for none."""
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._group: Any = None
        self._step = 0
        self._pending: Future[Any] | None = None

    def save(self, step: int, method: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint: from here on training may change what is saved.

        Raises UserError if the one before could not be written.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.wait()
        final = self.run / "checkpoints" / f"step-{step:08d}"
        if final.exists():  # a run is a function of its step: it is this very checkpoint
            return
        part, self._step = final.with_suffix(".part"), step
        if parallel.world_size() > 1:
            self._group = self._group or parallel.side_group()
        everything = {**weights(method), **optimizer_state(method, optimizer)}
        if anew := [name for name, parameter in learning(method) if not optimizer.state[parameter]]:
            state = {"anew": anew, **state}  # no step was taken on them yet
        kinds = {name: 2 if is_optimizer(name) else 1 for name in everything}
        self._pending = attempted(lambda: make_room(part) if parallel.rank() == 0 else None)
        self.wait()  # all ranks go on, or none: the others would wait in vain for the first
        writer = HuggingFaceStorageWriter(str(part), fqn_to_index_mapping=kinds, save_distributed=True)
        begun: Future[Any] = attempted(
            lambda: async_save(
                everything, storage_writer=writer, process_group=self._group, no_dist=self._group is None
            )
        )
        if begun.exception():
            self._pending = begun  # told when all wait for it
        else:
            self._pending = self._thread.submit(self._finish, begun.result(), part, final, {"step": step, **state})

    def _finish(self, written: Any, part: Path, final: Path, state: dict[str, Any]) -> None:
        written.result()  # of all ranks
        if parallel.rank() > 0:
            return
        rename_pieces(part)
        (part / "state.json").write_text(json.dumps(state, indent=1))
        sums = [f"{sha256(file)}  {file.name}\n" for file in sorted(part.iterdir())]
        (part / CHECKSUMS).write_text("".join(sums))
        for path in (part / "state.json", part / CHECKSUMS, part, self.run):  # tensors are flushed by who wrote them
            flush(path)
        part.rename(final)
        flush(final.parent)
        try:
            for old in checkpoints(self.run)[: -self.keep]:
                if not self.keep_every or old.step % self.keep_every:
                    remove_folder(old.path)
        except OSError as error:
            raise UserError(
                f"the checkpoint of step {self._step} is written, and an older one cannot be deleted from {final.parent} "
                f"({error.strerror}): see who may write there, and run the same command"
            ) from error

    @property
    def trouble(self) -> bool:
        """Whether it is known here that the checkpoint which is being written cannot be."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole. Raises UserError, on every rank, if it cannot be."""
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        reasons = [r for r in parallel.gather(self._reason(error) if error else None) if r]
        if error and not reasons:
            raise error
        if reasons:
            if parallel.rank() == 0:
                shutil.rmtree(self.run / "checkpoints" / f"step-{self._step:08d}.part", ignore_errors=True)
            raise UserError(reasons[0]) from error

    def _reason(self, error: BaseException) -> str | None:
        """What a user is to be told; None if it was no disk."""
        if isinstance(error, UserError):
            return str(error)
        if not (reason := storage_failure(error)):
            return None
        older = [found.step for found in checkpoints(self.run) if found.step < self._step]
        kept = f"the one of step {older[-1]} is intact" if older else "there is no older one"
        return (
            f"cannot write the checkpoint of step {self._step} to {self.run / 'checkpoints'} ({reason}); {kept}: free some "
            "space, or see who may write there, and run the same command"
        )

    def close(self) -> None:
        self._thread.shutdown()


def save(run: Path, step: int, method: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Write one checkpoint and wait for it. Raises UserError."""
    saver = Saver(run, keep=1)
    try:
        saver.save(step, method, optimizer, state)
        saver.wait()
    finally:
        saver.close()


def attempted(call: Callable[[], T]) -> Future[T]:
    """A call that is over, and what came of it."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
    return future


def make_room(part: Path) -> None:
    """An empty folder to write to, and no other: what is there is of a write or a removal that was cut short."""
    for stale in part.parent.glob("step-*.part"):
        shutil.rmtree(stale)
    part.mkdir(parents=True)


def storage_failure(error: BaseException) -> str | None:
    """What the disk said, in one line, dug out of what torch.distributed.checkpoint wraps it in; None if it was no disk."""
    seen = [error, error.__cause__, *(wrapped[0] for wrapped in getattr(error, "failures", {}).values())]
    for found in seen:
        if isinstance(found, OSError | SafetensorError):
            return first_line(found)
    return None


def rename_pieces(part: Path) -> None:
    """From DCP's names, shard-00002-model-00001-of-00002.safetensors, to what is in them: weights-00002.safetensors."""
    for number, kind in ((1, "weights"), (2, "optimizer")):
        pieces = sorted(part.glob(f"shard-*-model-{number:05}-of-*.safetensors"))
        for piece in pieces:
            name = f"{kind}-{piece.name.split('-')[1]}" if len(pieces) > 1 else kind
            piece.rename(part / f"{name}.safetensors")


def sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ---------------------------------------------------------------- what is in one


def restore(checkpoint: Checkpoint, method: nn.Module, optimizer: Optimizer) -> None:
    """Load weights and optimiser state, strictly, on all ranks together. Raises UserError naming what does not fit."""
    ours = weights(method) | zero_optimizer_state(method, optimizer)
    theirs = checkpoint.shapes()
    anew = checkpoint.state().get("anew", [])  # had no state: an imported checkpoint did not hold it, or it was frozen
    for name, parameter in learning(method):
        if not any(k.startswith(f"{name}/") for k in theirs) and (checkpoint.step == 0 or name in anew):
            for key in optimizer.state.pop(parameter):  # no step was taken on it yet
                del ours[f"{name}/{key}"]
    check_fit(ours, theirs, str(checkpoint.path))
    reason = None
    try:
        checkpoint.verify(checkpoint.files()[parallel.rank() :: parallel.world_size()])
    except UserError as error:
        reason = str(error)
    if reasons := [r for r in parallel.gather(reason) if r]:
        raise UserError(reasons[0])
    checkpoint.load(ours, together=parallel.world_size() > 1)


def is_optimizer(name: str) -> bool:
    return "/" in name


def learning(method: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in method.named_parameters() if p.requires_grad]


def weights(method: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in method.state_dict().items()}


def optimizer_state(method: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Optimiser tensors under their parameters' names: `encoder.norm.weight/exp_avg`."""
    return {
        f"{name}/{key}": torch.as_tensor(value).contiguous()
        for name, parameter in learning(method)
        for key, value in optimizer.state[parameter].items()
    }


def zero_optimizer_state(method: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """AdamW's state before the first step, put in place."""
    for _, parameter in learning(method):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer_state(method, optimizer)

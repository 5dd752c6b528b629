"""The processes of one launch: how they meet, and whose error is told when one of them fails, vanishes or hangs.

torchrun, Slurm or whoever starts the processes says by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT who they are. Beside
their collectives they leave notes in the store that they met at: each that it lives and which step it has come to, and the first
that fails that it was the first. The others then end quietly, so that one job has one error.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from openjepa.engine import parallel
from openjepa.engine.run import Interrupted
from openjepa.errors import UserError

TICK = 1.0  # seconds between two signs of life
GRACE = 4 * TICK  # for the rank that failed to say so, and for one that is gone to be missed
LOST = re.compile(r"gloo|nccl|connection|process ?group|socket|store|timed? ?out", re.IGNORECASE)  # of torch's messages


class Roll:
    """What the ranks know of each other beside their collectives."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self.store, self.rank, self.ranks = store, rank, ranks
        self.patience = float("inf")  # seconds that a step may take
        self._step, self._since, self._ticks = -1, float("inf"), 0  # no step yet: what comes before may take its time
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def begin(self, step: int) -> None:
        """This rank has all it needs for a step and goes to meet the others in it."""
        self._step, self._since = step, time.monotonic()

    def leave(self) -> None:
        self._left.set()
        self._thread.join()

    def first(self) -> bool:
        """Whether this rank is the first to fail: then its error is the one that is told."""
        name = str(self.rank)
        return self.store.compare_set("failed", "", name).decode() == name

    def someone_failed(self) -> bool:
        return self.store.check(["failed"])

    def steps(self) -> list[int]:
        """The step that each rank has come to."""
        return [step for _, step in self._signs()]

    def gone(self) -> list[int]:
        """Ranks that show no sign of life."""
        before = self._signs()
        time.sleep(2 * TICK)
        return [rank for rank, (a, b) in enumerate(zip(before, self._signs(), strict=True)) if a[0] == b[0]]

    def _signs(self) -> list[tuple[int, int]]:
        """Ticks and step of each rank."""
        keys = [f"seen/{rank}" for rank in range(self.ranks)]
        notes = self.store.multi_get(keys) if self.store.check(keys) else [b"0 -1"] * self.ranks
        return [tuple(map(int, note.split())) for note in notes]  # type: ignore[misc]

    def _watch(self) -> None:
        while True:
            try:
                self._ticks += 1
                self.store.set(f"seen/{self.rank}", f"{self._ticks} {self._step}")
                if time.monotonic() - self._since > self.patience:
                    self._give_up()
            except RuntimeError:  # the store is gone, and with it the rank that kept it: the collectives will say so
                return
            if self._left.wait(TICK):
                return

    def _give_up(self) -> None:
        """End this process, which has waited too long, and name whom it waited for."""
        steps, waited = self.steps(), f"{self.patience:g} s"
        behind = [rank for rank, step in enumerate(steps) if step < max(steps)]
        told = []
        if self.rank in behind or not behind:
            stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0], limit=12)
            told += [f"rank {self.rank} hangs here:\n", *stack]
        if self.first():
            if behind:
                what = f"{ranks(behind)} hangs: the others have waited for it in step {max(steps)} for {waited}"
            else:
                what = (
                    f"step {max(steps)} has not ended in {waited}: all ranks are in it, a device or the network hangs"
                )
            told.append(f"openjepa: {what} (machine.patience_s); the same command goes on\n")
        sys.stderr.write("".join(told))  # at once, so that the ranks' lines do not mix
        sys.stderr.flush()
        os._exit(1)

    def judge(self, error: Exception) -> Exception | SystemExit:
        """What this rank ends with, having met an error: the error if it is to be told here."""
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # torchrun's, at the first that ends: there is something to say yet
        try:
            if isinstance(error, UserError) or not LOST.search(f"{type(error).__name__} {error}"):
                return error if self.first() else SystemExit(1)
            end = time.monotonic() + GRACE
            while time.monotonic() < end:
                if self.someone_failed():
                    return SystemExit(1)
                time.sleep(TICK / 10)
            missing, step = self.gone(), self._step
            if not missing or not self.first():
                return error if not missing else SystemExit(1)
        except RuntimeError:  # rank 0 kept the store and is gone
            missing, step = [0], self._step
        told = UserError(
            f"{ranks(missing)} is gone (killed?), the others were in step {step}: the same command goes on"
        )
        told.__cause__ = error
        return told


def ranks(numbers: list[int]) -> str:
    return f"rank {', '.join(map(str, numbers))}"


_roll: Roll | None = None


@contextmanager
def joined() -> Iterator[Roll | None]:
    """Meet the processes that were launched beside this one. None where there are none.

    Inside, the first error of any rank is told once. Does nothing when the process has joined already.
    """
    global _roll
    if _roll or dist.is_initialized() or parallel.launched()[1] == 1:
        yield _roll
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=size
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {parallel.launched()[0]} cannot meet the others: {' '.join(str(error).split())}"
        ) from error
    _roll = Roll(store.clone(), rank, size)
    stopped = None
    try:
        try:
            yield _roll
        except Interrupted as stop:  # of all ranks alike
            stopped = stop
        parallel.barrier()
        dist.destroy_process_group()
    except Exception as error:
        if (end := _roll.judge(error)) is error:
            raise
        raise end from None
    finally:
        _roll.leave()
        _roll = None
    if stopped:
        raise stopped

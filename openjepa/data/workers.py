"""Processes that load: items of a data set in order, made by some workers; a worker that dies or hangs is named with its cause."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Collection, Generator, Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, default_collate

from openjepa.data import store
from openjepa.errors import UserError

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # what asks a run to stop after its step
STUCK_S = 1800  # seconds without a batch
LOOK_S = 5  # between looks at whether the workers live
NUMBER = "machine.workers (or --workers)"
CAUSES = {
    "SIGKILL": f"memory ran out, most likely: lower {NUMBER}",
    "SIGBUS": f"shared memory (/dev/shm) is full, or a file that is mapped into memory was cut short: lower {NUMBER}, or give "
    "a container more (--shm-size)",
    "SIGSEGV": f"a decoder crashed, on a damaged image most likely: 0 as {NUMBER} shows where",
    "SIGTERM": "somebody ended it",
}  # of a worker's death, by signal


class Told(Dataset[Any]):
    """The items of a data set, or the UserError that making one met: a worker would wrap it in its traceback."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Any:
        try:
            return self.items[i]
        except UserError as error:
            return error


def loaded(
    items: Dataset[Any],
    workers: int,
    *,
    read_mb_s: float | None = None,
    **how: Any,
) -> Generator[Any, None, None]:
    """What torch's DataLoader makes of a data set, in order. read_mb_s: what each worker may read from a store.

    how: for the DataLoader. What is made goes to this process as tensors, and as little else as can be: a worker that dies in
    the middle of a message that is longer than a pipe takes at once (4 kB) would leave its reader waiting for the rest.
    Raises the UserError that making an item met, or that a worker died or hangs.
    """
    loader = DataLoader(
        Told(items),
        num_workers=workers,
        collate_fn=_collated if how.get("batch_size", 1) else _same,
        worker_init_fn=partial(_begin, read_mb_s),
        timeout=LOOK_S if workers else 0,
        **how,
    )
    others = set(multiprocessing.active_children())
    with _no_errors_from_signals():
        made = iter(loader)
    children = set(multiprocessing.active_children()) - others
    try:
        while not isinstance(found := next_of(made, children), End):
            if isinstance(found, UserError):
                raise found
            yield found
    finally:
        for worker in children:
            worker.kill()
        del made  # torch puts its queues away here and now: no traceback of an error holds them


class End:
    """What comes after the last."""


def next_of(made: Iterator[T], workers: Collection[BaseProcess]) -> T | End | UserError:
    """The next that a loader makes, or what is to be told where a worker has died, or nothing comes in STUCK_S."""
    for _ in range(round(STUCK_S / LOOK_S)):
        try:
            return next(made, End())
        except (RuntimeError, OSError, EOFError) as error:  # the latter: it died while it handed a batch over
            late = str(error).startswith("DataLoader timed out")
            if workers and not late:
                dying = multiprocessing.connection.wait([worker.sentinel for worker in workers], LOOK_S)
                for worker in workers:
                    if worker.sentinel in dying:
                        worker.join(LOOK_S)  # now its status is known
            if cause := cause_of_death(workers):
                return UserError(f"{cause}; run the same command again")
            if not late:
                raise
    return UserError(f"no batch in {STUCK_S} s: reading hangs, of a disk or a network")


def cause_of_death(workers: Iterable[BaseProcess]) -> str | None:
    """What ended the first of some worker processes that has ended, which none does by itself; None if none has."""
    for worker in workers:
        if (status := worker.exitcode) is None:
            continue
        if status >= 0:
            return f"a process that makes batches ended with status {status}: what it wrote above says why"
        name = signal.Signals(-status).name
        why = CAUSES.get(name, "no image and no library is known to do this: please report it")
        return f"a process that makes batches was killed by signal {-status} ({name}): {why}"
    return None


@contextlib.contextmanager
def _no_errors_from_signals() -> Iterator[None]:
    """torch's loader has the end of a worker raise wherever the main process stands, in the writing of a checkpoint too.

    Without its handler the next batch that is asked for raises.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _collated(items: list[Any]) -> Any:
    """One batch, or the first UserError."""
    return next((item for item in items if isinstance(item, UserError)), None) or default_collate(items)


def _same(item: Any) -> Any:
    return item


def _begin(read_mb_s: float | None, worker: int) -> None:
    """Signals reach the whole process group; the main process alone decides what they mean."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    store.limit(read_mb_s)

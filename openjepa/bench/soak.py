"""`openjepa bench soak`: an hour of training in one process, workers begun anew every minute, memory and descriptors counted."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console

from openjepa.bench.clock import Rows
from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import Interrupted
from openjepa.errors import UserError
from openjepa.recipes.ijepa import ijepa_scenes
from openjepa.recipes.pretrain import pretrain

DATA = "scenes:2000"
WORKERS = 2
PARTS = 12  # rows of the table


@dataclass(frozen=True)
class Sample:
    """What the process holds at one time."""

    at_s: float
    rss_mib: float
    workers_rss_mib: float  # of all workers together
    descriptors: int
    threads: int


def soak(seconds: float = 3600, between: float = 60, every: float = 5) -> Rows:
    """Train on scenes; stop by a signal every so often and go on, so that workers, logs and threads begin anew.

    seconds: in all; between: signals; every: samples. Raises UserError where the system does not tell (no /proc).
    """
    if not Path("/proc/self/statm").exists():
        raise UserError("bench soak counts in /proc, which this system has not")
    recipe = ijepa_scenes()
    recipe = replace(
        recipe,
        schedule=replace(recipe.schedule, epochs=10_000),
        machine=replace(recipe.machine, workers=WORKERS, checkpoint_every=0.5),
    )
    start, samples, starts, steps = time.monotonic(), list[Sample](), list[float](), list[tuple[float, int]]()
    over = threading.Event()

    def count() -> None:
        while not over.wait(every):
            samples.append(sample(time.monotonic() - start))

    counting = threading.Thread(target=count)
    counting.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            while time.monotonic() - start < seconds:
                starts.append(time.monotonic() - start)
                alarm = threading.Timer(between, os.kill, (os.getpid(), signal.SIGUSR1))
                alarm.start()
                try:
                    pretrain(recipe, DATA, run, Console(quiet=True))
                except Interrupted:
                    pass
                finally:
                    alarm.cancel()
                steps.append((time.monotonic() - start, checkpoints(run)[-1].step))
    finally:
        over.set()
        counting.join()
    length = seconds / PARTS
    rows: Rows = []
    for part in range(PARTS):
        begin, end = part * length, (part + 1) * length
        here = [s for s in samples if begin <= s.at_s < end]
        rows.append(
            {
                "minutes": end / 60,
                "starts": sum(at < end for at in starts),
                "steps": max([step for at, step in steps if at < end], default=0),
                "rss_mib": median(s.rss_mib for s in here),
                "workers_rss_mib": median(s.workers_rss_mib for s in here),
                "descriptors": median(s.descriptors for s in here),
                "threads": median(s.threads for s in here),
            }
        )
    return rows


def sample(at: float) -> Sample:
    me = os.getpid()
    return Sample(
        at,
        rss_mib(me),
        sum(rss_mib(child) for child in children(me)),
        len(os.listdir(f"/proc/{me}/fd")),
        threading.active_count(),
    )


def rss_mib(pid: int) -> float:
    """Resident memory of a process; 0 where it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0


def children(pid: int) -> list[int]:
    """Processes that this one has begun."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found

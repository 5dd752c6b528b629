"""Claims about processes that load: whatever ends one is named in one line, in training, in evaluation, where scenes are drawn."""

import multiprocessing
import os
import pickle
import re
import select
import shutil
import signal
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from openjepa.data import scenes, workers
from openjepa.data.scenes import Scenes
from openjepa.data.sources import Folder, open_source
from openjepa.data.stream import Batch, batches
from openjepa.errors import UserError
from openjepa.masking import MaskingConfig, TokenMasks, sample
from tests.helpers import command, refused, steps_of


@pytest.mark.parametrize("status", [0, 7])
def test_a_worker_that_ends_itself_is_named_with_its_status(folder, monkeypatch, status):
    monkeypatch.setattr(workers, "LOOK_S", 0.5)
    steps = steps_of(open_source(str(folder)))
    monkeypatch.setattr(steps, "batch", lambda step: os._exit(status))
    with pytest.raises(UserError, match=f"a process that makes batches ended with status {status}: .* command again"):
        next(batches(steps, 0, 5, 2, pin=False))


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "x")]
)
def test_a_worker_that_dies_as_it_hands_a_batch_over_is_named(error):
    """What then comes is an error of the socket between the two, before the system knows the worker to be dead."""
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGKILL))
    )
    worker.start()

    def broken():
        raise error
        yield

    told = workers.next_of(broken(), [worker])
    assert isinstance(told, UserError)
    assert re.search(r"was killed by signal 9 \(SIGKILL\).*command again", str(told))
    with pytest.raises(type(error)):  # without a death it is what it is
        workers.next_of(broken(), [])


def test_a_worker_that_hangs_is_waited_for_and_then_refused(folder, monkeypatch):
    monkeypatch.setattr(workers, "LOOK_S", 0.25)
    monkeypatch.setattr(workers, "STUCK_S", 1)
    steps = steps_of(open_source(str(folder)))
    make = steps.batch
    monkeypatch.setattr(steps, "batch", lambda step: time.sleep(600) if step == 2 else make(step))
    made = batches(steps, 0, 5, 1, pin=False)
    assert len([next(made), next(made)]) == 2
    with pytest.raises(UserError, match="no batch in 1 s: reading hangs"):
        next(made)


def test_what_a_worker_hands_over_is_no_longer_than_a_pipe_takes_at_once():
    """Longer messages, of a worker that dies in the middle of one, would be waited for for ever."""
    images, slots = torch.zeros(4096, 2, 3, 4, 4, dtype=torch.uint8), np.arange(4096)
    context = sample(MaskingConfig(context="packed"), (8, 8), 0, 0, slots)
    for masks, small in ((context, None), (TokenMasks(torch.zeros(4096, 2, 64, dtype=torch.bool), 0), images)):
        batch = Batch(images, masks, slots, [], small)
        message = ForkingPickler.dumps(batch)
        assert len(message) < select.PIPE_BUF
        assert np.array_equal(pickle.loads(message).indices, slots)


# ---------------------------------------------------------------- elsewhere than in training


def test_there_is_one_loader_and_everybody_uses_it():
    package = Path(workers.__file__).parents[1]
    own = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"\bDataLoader\(", file.read_text())
    ]
    assert own == ["data/workers.py"]


@pytest.fixture
def asked(trained, folder, tmp_path, monkeypatch) -> dict[str, list[str]]:
    """Commands that read labelled images, two processes loading them."""
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folder, tmp_path / "images")
    how = ["--train", str(tmp_path / "images"), "--test", str(folder), "--workers", "2", "--out", str(tmp_path / "out")]
    return {
        "evaluate": ["evaluate", str(trained), "--protocols", "knn", *how],
        "finetune": ["finetune", str(trained), "--finetune.epochs", "1", *how],
    }


@pytest.mark.parametrize("what", ["evaluate", "finetune"])
def test_an_evaluations_worker_that_dies_is_named_with_its_cause(asked, monkeypatch, capsys, what):
    read, parent = Folder.read, os.getpid()

    def dying(self, index):
        if os.getpid() != parent and index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(Folder, "read", dying)
    told = refused(monkeypatch, capsys, *asked[what])
    assert told.startswith("openjepa: a process that makes batches was killed by signal 9 (SIGKILL): memory ran out")
    assert told.endswith("run the same command again\n")


@pytest.mark.parametrize("what", ["evaluate", "finetune"])
def test_an_evaluations_worker_hands_on_the_users_mistake_in_one_line(asked, monkeypatch, capsys, tmp_path, what):
    (tmp_path / "images/red/07.png").write_text("no")
    told = refused(monkeypatch, capsys, *asked[what])
    assert told.startswith("openjepa: unreadable image red/07.png (")
    assert told.endswith("leave it out\n")


def test_a_process_that_draws_scenes_and_dies_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    parent = os.getpid()

    def drawn(job):
        if os.getpid() != parent and job[1] > 128:
            os.kill(os.getpid(), signal.SIGSEGV)
        return np.zeros((job[2] - job[1], *job[3], 3), np.uint8)

    monkeypatch.setattr(scenes, "render_range", drawn)
    with pytest.raises(UserError, match=r"was killed by signal 11 \(SIGSEGV\)"):
        Scenes.from_spec("640", (16, 16)).read(0)
    assert not list(tmp_path.iterdir())  # nothing half drawn is kept


@pytest.mark.parametrize("what", ["evaluate", "finetune", "embed"])
def test_scenes_are_drawn_once_and_not_by_every_worker(asked, monkeypatch, capsys, tmp_path, what):
    cached = Scenes._cached

    def noting(self):
        (tmp_path / f"{os.getpid()}.drew").touch()
        return cached(self)

    monkeypatch.setattr(Scenes, "_cached", noting)
    words = {
        **asked,
        "embed": [
            "embed",
            asked["evaluate"][1],
            "--data",
            "scenes:20",
            "--workers",
            "2",
            "--out",
            str(tmp_path / "f.parquet"),
        ],
    }[what]
    for flag, spec in (("--train", "scenes:20"), ("--test", "scenes:20-40")):
        if flag in words:
            words[words.index(flag) + 1] = spec
    if what == "finetune":
        words += ["--task", "count"]
    elif what == "evaluate":
        words += ["--tasks", "count"]
    assert command(monkeypatch, capsys, *words)[0] == 0
    assert [file.name for file in tmp_path.glob("*.drew")] == [f"{os.getpid()}.drew"]


def test_a_negative_number_of_workers_is_refused(asked, monkeypatch, capsys):
    assert "--workers is -1" in refused(monkeypatch, capsys, *asked["evaluate"], "--workers", "-1")

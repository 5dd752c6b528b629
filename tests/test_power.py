"""Claims about the moment the power fails, or the disk does: at whichever call, what was whole stays whole, and the run goes on."""

import errno
import itertools
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from openjepa.data.sources import open_source
from openjepa.engine import parallel
from openjepa.engine.checkpoint import Saver, checkpoints, restore
from openjepa.engine.launch import joined
from openjepa.engine.whole import new_folder, write_whole
from openjepa.errors import UserError
from openjepa.recipes.pretrain import prepare, saved_data, saved_recipe
from tests.disk import Disk, after_power_failure, lay_out
from tests.test_parallel import launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors are followed through /proc")

STEPS = (10, 20, 30)


def trained(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and its optimiser after some steps, all of whose numbers say how many. Of several ranks each holds a share."""
    method = nn.Linear(3, 2)
    if parallel.world_size() > 1:
        parallel.spread(method, "fsdp", torch.device("cpu"), half=False)
    optimizer = torch.optim.AdamW(method.parameters())
    for parameter in method.parameters():
        nn.init.constant_(parameter, step)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{name: torch.full_like(parameter, float(step)) for name in ("exp_avg", "exp_avg_sq")},
        }
    return method, optimizer


def save_all(run: Path, keep: int, steps: tuple[int, ...] = STEPS) -> Iterator[int]:
    """One checkpoint after another; yields each step when its checkpoint is whole."""
    saver = Saver(run, keep)
    try:
        for step in steps:
            saver.save(step, *trained(step), {})
            saver.wait()
            yield step
    finally:
        saver.close()


def newest(run: Path) -> int:
    """The step of the newest checkpoint, 0 for none; all that are there are whole, and hold what was saved."""
    for found in checkpoints(run):
        method, optimizer = trained(0)
        restore(found, method, optimizer)
        held = [*method.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
        assert all((parallel.whole(tensor) == found.step).all() for tensor in held)
        assert found.state()["step"] == found.step
    return max((found.step for found in checkpoints(run)), default=0)


def every_loss(journal: list, tmp_path: Path) -> Iterator[tuple[int, str, Path]]:
    """Each state that a power failure during these calls may leave: after how many calls at the latest, in words, on disk."""
    latest = {}
    for calls in range(len(journal) + 1):
        for words, state in after_power_failure(journal[:calls]):
            key = tuple(sorted(state.items(), key=lambda item: item[0]))
            latest[key] = calls, f"after {journal[calls - 1][:2]}: {words}"
    for number, (state, (calls, words)) in enumerate(latest.items()):
        root = tmp_path / f"state-{number}"
        root.mkdir()
        lay_out(dict(state), root)
        yield calls, words, root
        shutil.rmtree(root)


@pytest.mark.parametrize("keep", [1, 2])
def test_power_may_fail_at_any_call_of_a_save(tmp_path, keep):
    run = tmp_path / "run"
    run.mkdir()
    with Disk(run) as disk:
        whole = {len(disk.journal): step for step in save_all(run, keep)}
    assert list(whole.values()) == list(STEPS)
    assert {call for call, *_ in disk.journal} == {"mkdir", "create", "write", "fsync", "rename", "unlink", "rmdir"}
    found = set()
    for calls, words, state in every_loss(disk.journal, tmp_path):
        done = max((step for at, step in whole.items() if at <= calls), default=0)
        found.add(newest(state))
        assert newest(state) >= done, words
    assert found == {0, *STEPS}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_any_call_of_a_save_may_fail(tmp_path, error):
    run = tmp_path / "run"
    for fail_at in itertools.count():
        run.mkdir()
        done = list(save_all(run, 1, STEPS[:1]))[-1]
        told = None
        with Disk(run, fail_at, error) as disk:
            try:
                for step in save_all(run, 1, STEPS[1:]):
                    done = step
            except UserError as refusal:
                told = str(refusal)
        if not disk.failed:
            break
        if told is None:  # a folder made once more, which was there
            assert disk.failed.startswith("mkdir")
            assert done == newest(run) == STEPS[-1]
            shutil.rmtree(run)
            continue
        failing = STEPS[STEPS.index(done) + 1]
        cannot_write = (
            f"cannot write the checkpoint of step {failing} to {run / 'checkpoints'} ({os.strerror(error)}); "
        )
        cannot_delete = f"the checkpoint of step {failing} is written, and an older one cannot be deleted from "
        assert told.startswith((cannot_write + f"the one of step {done} is intact", cannot_delete)), disk.failed
        assert len(told.splitlines()) == 1
        assert newest(run) >= (failing if told.startswith(cannot_delete) else done), disk.failed
        list(save_all(run, 1, tuple(step for step in (*STEPS, 40) if step > newest(run))))  # the same command goes on
        assert newest(run) == 40
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000040"], disk.failed
        shutil.rmtree(run)
    assert fail_at > 50


# ---------------------------------------------------------------- by two ranks


def together(function: str, tmp_path: Path, *words: object) -> None:
    """Call a function of this file on two ranks, with these words."""
    root = Path(__file__).parents[1]
    code = f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom tests import test_power\ntest_power.{function}(*sys.argv[1:])"
    done = launch(2, code, tmp_path, *words)
    assert done.returncode == 0, done.err[-3000:]


def journals(run: str, out: str) -> None:
    """On every rank: what it does to the disk, and when each checkpoint was whole."""
    with joined(), Disk(Path(run)) as disk:
        whole = {time.monotonic_ns(): step for step in save_all(Path(run), 1, STEPS[:2])}
        Path(out, f"{parallel.rank()}.pickle").write_bytes(pickle.dumps((disk.journal, disk.times, whole)))


def test_power_may_fail_at_any_call_of_a_save_by_two_ranks(tmp_path):
    """Of which both write to one disk."""
    run = tmp_path / "run"
    run.mkdir()
    together("journals", tmp_path, run, tmp_path)
    kept = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    for journal, *_ in kept:
        assert {call for call, *_ in journal} >= {"create", "write", "fsync"}
    calls = sorted(((at, call) for journal, times, _ in kept for at, call in zip(times, journal, strict=True)),
                   key=lambda pair: pair[0])  # fmt: skip
    journal, whole = [call for _, call in calls], kept[0][2]
    found = set()
    for count, words, state in every_loss(journal, tmp_path):
        lost_at = calls[count][0] if count < len(calls) else calls[-1][0] + 1
        done = max((step for at, step in whole.items() if at < lost_at), default=0)
        found.add(newest(state))
        assert newest(state) >= done, words
    assert found == {0, *STEPS[:2]}


def failing(run: str, faulty: str, every: str) -> None:
    """On every rank: one of them has one call after the other fail; what was whole stays whole, and both are told the same."""
    folder = Path(run)
    with joined():
        group = parallel.side_group()
        parallel.side_group = lambda: group
        mine = parallel.rank() == int(faulty)
        for fail_at in itertools.count(0, int(every)):
            parallel.barrier()  # both have looked
            if parallel.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            parallel.barrier()
            done = list(save_all(folder, 1, STEPS[:1]))[-1]
            told = None
            with Disk(folder, fail_at if mine else None, errno.EIO) as disk:
                try:
                    for step in save_all(folder, 1, STEPS[1:]):
                        done = step
                except UserError as refusal:
                    told = str(refusal)
            failed = parallel.gather(disk.failed)[int(faulty)]
            if failed is None:
                break
            assert len({(done, told) for done, told in parallel.gather((done, told))}) == 1, failed
            if told is None:  # a folder made once more, which was there
                assert failed.startswith("mkdir")
                assert newest(folder) == STEPS[-1]
                continue
            failing = STEPS[STEPS.index(done) + 1]
            assert told.startswith((f"cannot write the checkpoint of step {failing} to ",
                                    f"the checkpoint of step {failing} is written, and an older one cannot")), failed  # fmt: skip
            assert newest(folder) >= done, failed
            left = tuple(step for step in (*STEPS, 40) if step > newest(folder))
            parallel.barrier()
            list(save_all(folder, 1, left))  # the same command goes on
            assert newest(folder) == 40, failed
            assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000040"], failed
        assert fail_at > 8  # the second rank only writes its share


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize("faulty", [0, 1])
def test_any_call_of_one_of_two_ranks_may_fail(tmp_path, faulty, every):
    together("failing", tmp_path, tmp_path / "run", faulty, every)


# ---------------------------------------------------------------- other files and folders


@pytest.mark.parametrize("before", [None, "old"])
def test_a_small_file_is_the_old_or_the_new_one(tmp_path, before):
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root) as disk:
        if before:
            write_whole(root / "file", before)
        begun = len(disk.journal)
        write_whole(root / "file", "new")
    found = set()
    for calls, words, state in every_loss(disk.journal, tmp_path):
        text = (state / "file").read_text() if (state / "file").exists() else None
        if calls >= begun:
            found.add(text)
            assert text in (before, "new"), words
        if calls == len(disk.journal):
            assert text == "new", words
    assert found == {before, "new"}


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    files = {"a": "1", "below/b": "2"}
    with Disk(root) as disk, new_folder(root / "deep" / "out") as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    found = set()
    for calls, words, state in every_loss(disk.journal, tmp_path):
        out = state / "deep" / "out"
        held = {str(file.relative_to(out)): file.read_text() for file in out.rglob("*") if file.is_file()}
        found.add(len(held))
        assert held == files or (not out.exists() and calls < len(disk.journal)), words
    assert found == {0, len(files)}


def test_a_run_is_begun_again_whenever_the_power_failed_as_it_began(tmp_path, tiny, folder):
    source = open_source(str(folder), tiny.model.image_size)
    root = tmp_path / "disk"
    root.mkdir()
    with Disk(root) as disk:
        prepare(root / "deep" / "run", tiny, str(folder), source)
    for calls, words, state in every_loss(disk.journal, tmp_path):
        run = state / "deep" / "run"
        if calls == len(disk.journal):
            assert (run / "recipe.yaml").exists(), words
        prepare(run, tiny, str(folder), source)
        assert saved_recipe(run) == tiny
        assert saved_data(run)["images"] == len(source)

"""Claims about runs that are disturbed: a killed one goes on to the very same weights; nothing is lost or restarts silently."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import alone
from openjepa.errors import UserError
from openjepa.recipes import pretrain as pretraining
from openjepa.recipes.exchange import load
from openjepa.recipes.pretrain import build, pretrain, saved_recipe
from openjepa.recipes.recipe import Recipe, from_dict, override, to_yaml
from tests.conftest import TINY
from tests.helpers import logged, same, weights

QUIET = Console(quiet=True)


def command(recipe: Recipe, folder: Path, run: Path, config: Path) -> list[str]:
    config.write_text(to_yaml(recipe))
    return [
        sys.executable,
        "-m",
        "openjepa.cli",
        "pretrain",
        "--config",
        str(config),
        "--data",
        str(folder),
        "--out",
        str(run),
    ]


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> tuple[Recipe, Path]:
    """Sixty steps, a checkpoint every four, features of every part in play: drop path, accumulation, clipping."""
    recipe = override(
        from_dict(Recipe, TINY),
        {"schedule.epochs": "12", "machine.checkpoint_every": "0.8", "monitors.knn_every": "3", "model.drop_path": "0.1",
         "optim.accumulate": "2", "optim.clip_norm": "1.0", "precision": "bf16"},
    )  # fmt: skip
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(recipe, str(folder), run, QUIET)
    return recipe, run


SLOW = pytest.mark.slow


@pytest.mark.parametrize("workers", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW)])
def test_killed_at_random_three_times_ends_in_the_same_bits(undisturbed, folder, tmp_path, workers):
    recipe, reference = undisturbed
    run = tmp_path / "run"
    args = command(override(recipe, {"machine.workers": str(workers)}), folder, run, tmp_path / "recipe.yaml")
    moments = random.Random(workers)
    killed = 0
    for after in sorted(moments.sample(range(3, 55), 3)):
        process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        wait_for_step(run, after, process)
        time.sleep(moments.random() * 0.05)  # in a step, between two, or in the middle of a checkpoint
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2  # the third may come when the run has just ended
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert same(weights(run), weights(reference))
    clocks = ("images_per_s", "data_wait_share", "memory_gib", "elapsed_s")
    strip = [[{k: v for k, v in m.items() if k not in clocks} for m in logged(r)] for r in (run, reference)]
    assert strip[0] == strip[1]  # and the log has every step once


def test_a_second_signal_ends_the_process_at_once(tiny, folder, tmp_path):
    """While a step takes for ever: the first waits for it, the second does not."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\nfrom openjepa.cli import main\nfrom openjepa.methods.ijepa import IJEPA\n"
        "IJEPA.begin_step = lambda self, epoch: (print('in it', flush=True), time.sleep(600)) if epoch >= 1 else None\nmain()"
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(tiny))
    args = [
        sys.executable,
        "-u",
        str(program),
        "pretrain",
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--data",
        str(folder),
    ]
    process = subprocess.Popen(
        [*args, "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    while "in it" not in process.stdout.readline():
        assert process.poll() is None
    while not checkpoints(tmp_path / "run"):  # of the epoch before, written meanwhile
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while "once more to stop at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path / "run")[-1].step == 5


def test_a_run_that_another_process_trains_is_refused_before_anything_is_written(tiny, folder, tmp_path):
    pretrain(tiny, str(folder), tmp_path / "run", QUIET)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()}
    held = alone(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training in"):
        pretrain(override(tiny, {"machine.keep": "3"}), str(folder), tmp_path / "run", QUIET)
    os.close(held)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_the_newest_and_every_so_many_checkpoints_stay(tiny, folder, tmp_path):
    values = {"machine.checkpoint_every": "0.2", "machine.keep": "2", "machine.keep_every": "0.8"}
    pretrain(override(tiny, values), str(folder), tmp_path / "run", QUIET)
    assert [found.step for found in checkpoints(tmp_path / "run")] == [4, 8, 9, 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(undisturbed, folder, tmp_path, number):
    recipe, reference = undisturbed
    run = tmp_path / "run"
    args = command(override(recipe, {"machine.workers": "1"}), folder, run, tmp_path / "recipe.yaml")
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_step(run, 9, process)
    os.killpg(process.pid, number)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}[number]
    assert "Traceback" not in errors
    assert "the same command goes on" in errors
    stopped = checkpoints(run)[-1].step
    assert 9 <= stopped < 60
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert f"going on from step {stopped}" in done.stdout
    assert same(weights(run), weights(reference))


@pytest.mark.parametrize(
    ("number", "why", "times"),
    [(signal.SIGKILL, "memory ran out", 2), pytest.param(signal.SIGSEGV, "a decoder crashed", 3, marks=SLOW),
     pytest.param(signal.SIGKILL, "memory ran out", 6, marks=SLOW)],
)  # fmt: skip
def test_a_worker_that_dies_is_named_with_its_cause_and_the_same_command_goes_on(
    tiny, folder, tmp_path, number, why, times
):
    """At any moment, also while it hands a batch over."""
    run, recipe = (
        tmp_path / "run",
        override(tiny, {"schedule.epochs": str(6 * times), "machine.checkpoint_every": "0.4"}),
    )
    args = command(override(recipe, {"machine.workers": "2"}), folder, run, tmp_path / "recipe.yaml")
    for step in range(6, 6 + 20 * times, 20):
        process = subprocess.Popen(
            args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},  # torch's, of more workers than cores
        )  # fmt: skip
        wait_for_step(run, step, process)
        assert process.poll() is None, (process.returncode, process.communicate())
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        *others, line = errors.replace("\0", "").splitlines()  # torch's handler of a fault writes a line of its own
        assert len(others) == (number == signal.SIGSEGV), errors
        assert line.startswith(
            f"openjepa: a process that makes batches was killed by signal {int(number)} ({number.name}): {why}"
        )
        assert line.endswith("run the same command again")
        assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert "going on from step" in done.stdout
    pretrain(recipe, str(folder), tmp_path / "undisturbed", QUIET)
    assert same(weights(run), weights(tmp_path / "undisturbed"))


def test_a_disk_that_fills_leaves_the_checkpoint_before(tiny, folder, tmp_path):
    run = tmp_path / "run"
    recipe = override(tiny, {"machine.checkpoint_every": "0.4"})
    args = command(recipe, folder, run, tmp_path / "recipe.yaml")
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not checkpoints(run) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    # from now on no file can grow past 20 kB, as on a full disk
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "cannot write the checkpoint" in errors
    assert "is intact" in errors
    assert "Traceback" not in errors
    assert not list((run / "checkpoints").glob("*.part"))
    load(run)
    assert subprocess.run(args, capture_output=True, timeout=300).returncode == 0


def test_a_finished_run_stays_as_it_is(undisturbed, folder):
    recipe, run = undisturbed
    before = weights(run)
    pretrain(recipe, str(folder), run, QUIET)
    assert same(weights(run), before)


def test_another_recipe_or_other_images_are_refused_by_name(undisturbed, folder, tmp_path):
    recipe, run = undisturbed
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.002"):
        pretrain(override(recipe, {"optim.lr": "2e-3"}), str(folder), run, QUIET)
    with pytest.raises(UserError, match="other images"):
        pretrain(recipe, "scenes:40", run, QUIET)
    assert saved_recipe(run) == recipe


def test_the_same_images_may_move(undisturbed, folder, tmp_path):

    recipe, run = undisturbed
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    pretrain(recipe, str(moved), run, QUIET)
    pretrain(recipe, str(folder), run, QUIET)


def test_a_folder_that_is_no_run_is_not_written_to(tiny, folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a run"):
        pretrain(tiny, str(folder), tmp_path, QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_nothing_restarts(undisturbed, folder, tmp_path, file):

    recipe, reference = undisturbed
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    newest = checkpoints(run)[-1].path
    shutil.rmtree(newest)  # so that there is something left to do
    newest = checkpoints(run)[-1].path
    (newest / file).write_bytes((newest / file).read_bytes()[:20])
    with pytest.raises(UserError, match=f"{newest.name} is damaged") as error:
        pretrain(recipe, str(folder), run, QUIET)
    assert "\n" not in str(error.value)


def test_load_gives_the_target_encoder_and_says_so(undisturbed):
    _, run = undisturbed
    encoder = load(run)
    assert encoder.network == "target_encoder"
    saved = weights(run)
    assert torch.equal(encoder.vit.norm.weight, saved["target_encoder.norm.weight"])
    context = load(run, "encoder")
    assert torch.equal(context.vit.norm.weight, saved["encoder.norm.weight"])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert encoder(images).shape == (2, 64, 24)
    assert encoder.features(images, layers=2).shape == (2, 48)
    assert torch.allclose(encoder(images), encoder(images.float() / 255), atol=1e-5)


def test_a_checkpoint_folder_is_loaded_as_itself(tiny, folder, tmp_path):
    run = tmp_path / "run"
    pretrain(override(tiny, {"machine.checkpoint_every": "1"}), str(folder), run, QUIET)
    older, newer = (load(found.path) for found in checkpoints(run))
    assert torch.equal(newer.vit.norm.weight, load(run).vit.norm.weight)
    assert not torch.equal(older.vit.norm.weight, newer.vit.norm.weight)
    with pytest.raises(UserError, match="is not a run"):
        load(run / "checkpoints" / "step-00000099")


def test_metrics_hold_what_the_monitors_promise(undisturbed):
    _, run = undisturbed
    lines = logged(run)
    assert [m["step"] for m in lines if "loss" in m] == list(range(1, 61))
    promised = {"loss", "feature_std", "feature_rank", "feature_cosine", "encoder_distance", "context_tokens",
                "target_tokens", "lr", "weight_decay", "ema_momentum", "gradient_norm", "images_per_s", "data_wait_share",
                "memory_gib", "epoch"}  # fmt: skip
    assert promised <= lines[0].keys()
    assert any("knn_accuracy" in m for m in lines)
    assert list((run / "tensorboard").iterdir())


def test_a_knn_look_asks_each_image_once_and_never_of_itself(tiny, folder, tmp_path, monkeypatch):
    asked, predict = [], pretraining.knn_predict

    def watched(bank, labels, queries, *more, **named):
        asked.extend(queries.tolist())
        assert len(bank) == 16
        assert not {*map(tuple, queries.tolist())} & {*map(tuple, bank.tolist())}
        return predict(bank, labels, queries, *more, **named)

    monkeypatch.setattr(pretraining, "knn_predict", watched)
    pretrain(override(tiny, {"monitors.knn_every": "9"}), str(folder), tmp_path / "run", QUIET)
    assert len(asked) == len({*map(tuple, asked)}) == 20  # monitors.knn_images, at the run's end


def test_one_image_has_no_neighbours_and_is_trained_on(tiny, tmp_path):
    one = override(tiny, {"data.batch_size": "1", "schedule.epochs": "2", "monitors.knn_every": "1"})
    pretrain(one, "scenes:1", tmp_path / "run", QUIET)
    assert not any(key.startswith("knn_accuracy") for line in logged(tmp_path / "run") for key in line)


def test_the_saved_recipe_is_the_resolved_one(undisturbed):
    recipe, run = undisturbed
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["depth"] == 2
    assert build(saved_recipe(run)).encoder.config == recipe.model


@pytest.mark.parametrize("left", [(), ("data.json.part",), ("data.json",), ("data.json", "recipe.yaml.part")])
def test_a_start_killed_at_once_is_begun_again(tiny, folder, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).write_text("")
    pretrain(tiny, str(folder), run, QUIET)
    assert checkpoints(run)[-1].step == 10


def test_a_checkpoint_moved_aside_is_no_checkpoint(tiny, folder, tmp_path):
    run = tmp_path / "run"
    pretrain(override(tiny, {"machine.checkpoint_every": "0.4"}), str(folder), run, QUIET)
    newest = checkpoints(run)[-1].path
    newest.rename(newest.with_suffix(".bad"))
    assert checkpoints(run)[-1].step < 10

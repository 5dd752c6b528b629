"""Claims about the engine: a killed run goes on to the very same weights; nothing is lost, nothing restarts silently."""

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
from safetensors.torch import load_file

from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import alone
from openjepa.errors import UserError
from openjepa.methods.ijepa import IJEPA
from openjepa.recipes.exchange import load
from openjepa.recipes.pretrain import build, pretrain, saved_recipe
from openjepa.recipes.recipe import Recipe, override, to_yaml
from openjepa.recipes.replay import replay
from openjepa.recipes.report import report

QUIET = Console(quiet=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1].path / "weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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


def logged(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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
    from tests.conftest import TINY

    recipe = override(
        _recipe(TINY),
        {"schedule.epochs": "12", "machine.checkpoint_every": "0.8", "monitors.knn_every": "3", "model.drop_path": "0.1",
         "optim.accumulate": "2", "optim.clip_norm": "1.0", "precision": "bf16"},
    )  # fmt: skip
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(recipe, str(folder), run, QUIET)
    return recipe, run


def _recipe(values: dict) -> Recipe:
    from openjepa.recipes.recipe import from_dict

    return from_dict(Recipe, values)


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


def test_automatic_precision_is_settled_when_a_run_begins(tiny, folder, tmp_path, monkeypatch):
    run, auto = tmp_path / "run", override(tiny, {"precision": "auto"})
    for fast in (True, False):  # as if the second start came on another machine
        monkeypatch.setattr("openjepa.engine.device.has_fast_bf16", lambda device, fast=fast: fast)
        pretrain(auto, str(folder), run, QUIET)
        assert saved_recipe(run).precision == "bf16"
    with pytest.raises(UserError, match="precision: bf16 -> fp32"):
        pretrain(tiny, str(folder), run, QUIET)


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


def test_too_many_bad_images_stop_the_run(tiny, folder, tmp_path):

    images = tmp_path / "images"
    shutil.copytree(folder, images)
    for i in range(6):
        (images / f"red/{i:02}.png").write_text("no")
    with pytest.raises(UserError, match=r"of 40 images are unreadable, more than data.max_bad = 0.1"):
        pretrain(tiny, str(images), tmp_path / "run", QUIET)
    run = tmp_path / "run2"
    pretrain(override(tiny, {"data.max_bad": "0.5"}), str(images), run, QUIET)
    assert len((run / "bad_images.txt").read_text().splitlines()) == 6


def test_a_loss_that_explodes_stops_the_run_in_one_line(tiny, folder, tmp_path):
    recipe = override(tiny, {"optim.lr": "1e30", "optim.start_lr": "1e30", "monitors.max_bad_steps": "5"})
    with pytest.raises(UserError, match="5 steps in a row were not finite"):
        pretrain(recipe, str(folder), tmp_path / "run", QUIET)


def test_no_checkpoint_is_written_while_steps_are_not_finite(tiny, folder, tmp_path):
    """Older ones may be better than weights that a last finite step made too large."""
    values = {"optim.lr": "1e30", "optim.start_lr": "1e-9", "schedule.warmup_epochs": "1", "schedule.epochs": "8",
              "machine.checkpoint_every": "0.2", "machine.keep": "99", "monitors.max_bad_steps": "4"}  # fmt: skip
    with pytest.raises(UserError, match=r"4 steps in a row were not finite") as told:
        pretrain(override(tiny, values), str(folder), tmp_path / "run", QUIET)
    bad = [int(line.split("\t")[0]) for line in (tmp_path / "run" / "bad_steps.txt").read_text().splitlines()]
    saved = [found.step for found in checkpoints(tmp_path / "run")]
    assert not set(saved) & set(bad)
    assert f"the newest checkpoint is of step {saved[-1]}, before them" in str(told.value)
    kept = Path(str(told.value).rpartition("openjepa replay ")[2])
    assert kept == tmp_path / "run" / "bad_steps" / f"step-{bad[-1]:08}"
    lines = list(replay(kept))
    assert lines[0].startswith(f"step {bad[-1]}, 1 part")
    assert lines[-1] == "8 images have a loss that is not finite"
    assert "first not finite after " in lines[1]
    *_, names = (tmp_path / "run" / "bad_steps.txt").read_text().splitlines()[-1].split("\t")
    assert [line.removeprefix("image ").partition(":")[0] for line in lines[1:9]] == names.split(", ")
    assert all((folder / name).exists() for name in names.split(", "))


def test_a_bad_step_is_named_once_however_often_the_run_goes_on(tiny, folder, tmp_path, monkeypatch):
    """Killed after bad steps that its newest checkpoint does not know of, it meets them again."""
    run, seen = tmp_path / "run", []
    plain = IJEPA.forward

    def odd(self, images, masks, small=None):
        step = len(seen) + 1
        seen.append(step)
        return plain(self, images * float("nan") if step in (2, 4, 7) else images, masks)

    monkeypatch.setattr(IJEPA, "forward", odd)
    recipe = override(tiny, {"machine.checkpoint_every": "0.6", "machine.keep": "9"})
    pretrain(recipe, str(folder), run, QUIET)
    told = (run / "bad_steps.txt").read_text()
    assert [line.split("\t")[0] for line in told.splitlines()] == ["2", "4", "7"]
    for newer in [found for found in checkpoints(run) if found.step > 3]:
        shutil.rmtree(newer.path)
    seen[:] = [1, 2, 3]
    pretrain(recipe, str(folder), run, QUIET)
    assert (run / "bad_steps.txt").read_text() == told
    assert checkpoints(run)[-1].state()["skipped_steps"] == 3


def test_bad_images_are_noted_with_every_checkpoint(tiny, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    for i in range(8):
        (tmp_path / "images" / "red" / f"{i:02}.png").write_text("no image")
    values = {
        "machine.checkpoint_every": "0.2",
        "machine.keep": "99",
        "data.max_bad": "0.5",
        "monitors.log_every": "1000",
    }
    pretrain(override(tiny, values), str(tmp_path / "images"), tmp_path / "run", QUIET)
    noted = [len(found.state()["bad_images"]) for found in checkpoints(tmp_path / "run")]
    assert noted == sorted(noted)
    assert 0 < noted[1] < noted[-1] == 8


def test_training_learns_something(tiny, folder, tmp_path):
    """The loss of the last epoch is below the first's, with the targets almost still."""
    recipe = override(tiny, {"schedule.epochs": "15", "schedule.ema": "[0.9999, 1.0]"})
    pretrain(recipe, str(folder), tmp_path / "run", QUIET)
    losses = [m["loss"] for m in logged(tmp_path / "run") if "loss" in m]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_accumulated_steps_equal_whole_ones(tiny, folder, tmp_path):
    for parts in ("1", "4"):
        recipe = override(tiny, {"optim.accumulate": parts, "precision": "fp32"})
        pretrain(recipe, str(folder), tmp_path / parts, QUIET)
    a, b = (weights(tmp_path / parts) for parts in ("1", "4"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_the_seed_decides_everything(tiny, folder, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        pretrain(override(tiny, {"seed": seed}), str(folder), tmp_path / name, QUIET)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)


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


def test_the_saved_recipe_is_the_resolved_one(undisturbed):
    recipe, run = undisturbed
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["depth"] == 2
    assert build(saved_recipe(run)).encoder.config == recipe.model


def test_packed_contexts_train(tiny, folder, tmp_path):
    pretrain(override(tiny, {"masking.context": "packed"}), str(folder), tmp_path / "run", QUIET)
    assert logged(tmp_path / "run")[-1]["step"] == 10


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


@pytest.mark.parametrize("log", ["", '{"step": 1, "loss": 1.0}\n{"step": 2, "lo'])
def test_a_report_of_a_short_or_torn_log(tiny, folder, tmp_path, log):
    run = tmp_path / "run"
    pretrain(tiny, str(folder), run, QUIET)
    (run / "metrics.jsonl").write_text(log)
    assert "What images look alike" in report(run).read_text()


def test_a_handful_of_images_with_odd_names_trains_and_reports(tiny, folder, tmp_path):
    images = tmp_path / "images"
    (images / "c[/b]").mkdir(parents=True)
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:4]):
        (images / "c[/b]" / f"{i}.png").write_bytes(file.read_bytes())
    (images / "c[/b]" / "4.png").write_text("no image")
    recipe = override(tiny, {"data.batch_size": "5", "data.max_bad": "0.5"})
    console = Console(record=True, width=200)
    pretrain(recipe, str(images), tmp_path / "run", console)
    assert "unreadable image c[/b]/4.png (not an image of a kind that is read)" in console.export_text()
    assert (tmp_path / "run/bad_images.txt").read_text() == "c[/b]/4.png\tnot an image of a kind that is read\n"
    assert report(tmp_path / "run").exists()

"""Claims about training: bad images and bad steps are counted and named, the seed decides everything, a run says what it did."""

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from openjepa.engine.checkpoint import checkpoints
from openjepa.errors import UserError
from openjepa.methods.ijepa import IJEPA
from openjepa.recipes.pretrain import pretrain, saved_recipe
from openjepa.recipes.recipe import override
from openjepa.recipes.replay import replay
from openjepa.recipes.report import report
from tests.helpers import logged, same, weights

QUIET = Console(quiet=True)


def test_automatic_precision_is_settled_when_a_run_begins(tiny, folder, tmp_path, monkeypatch):
    run, auto = tmp_path / "run", override(tiny, {"precision": "auto"})
    for fast in (True, False):  # as if the second start came on another machine
        monkeypatch.setattr("openjepa.engine.device.has_fast_bf16", lambda device, fast=fast: fast)
        pretrain(auto, str(folder), run, QUIET)
        assert saved_recipe(run).precision == "bf16"
    with pytest.raises(UserError, match="precision: bf16 -> fp32"):
        pretrain(tiny, str(folder), run, QUIET)


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


def test_packed_contexts_train(tiny, folder, tmp_path):
    pretrain(override(tiny, {"masking.context": "packed"}), str(folder), tmp_path / "run", QUIET)
    assert logged(tmp_path / "run")[-1]["step"] == 10


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

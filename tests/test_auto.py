"""ijepa_auto: what it chooses, why, and that it is a recipe like any other."""

import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import Run
from openjepa.recipes import auto, budget
from openjepa.recipes.pretrain import saved_recipe
from openjepa.recipes.recipe import Recipe, from_dict
from tests.helpers import command, refused

CPU = {"machine.device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    """48 photographs of 40x70 pixels, dark and without much contrast, and a file that is none."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(48):
        pixels = np.random.default_rng(i).integers(20, 60, (40, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i:02}.png")
    (images / "broken.png").write_bytes(b"no image")
    return images


@pytest.fixture
def swift(monkeypatch):
    """A machine that makes 320 images a second, whatever the network."""
    monkeypatch.setattr(auto, "pace", lambda recipe, *_: 320.0)


def asked(images, run) -> list[str]:
    """A second of training."""
    return ["pretrain", "--recipe", "ijepa_auto", "--data", str(images), "--out", str(run), "--budget", "1s"]


def test_it_looks_at_the_images(folder, swift):
    recipe = auto.choose(str(folder), "60s", CPU).recipe
    assert recipe.model.image_size == (32, 32)  # the shorter side is 40
    assert recipe.model.grid == (8, 8)
    assert recipe.data.mean == pytest.approx((39.5 / 255,) * 3, abs=0.01)
    smooth, noise = 0.3 * 40 / 12**0.5 / 255, 40 / 12**0.5 / 255
    assert all(smooth < std <= noise for std in recipe.data.std)  # of noise, which resizing by a fifth smooths a little


def test_it_fills_the_time(folder, swift):
    recipe = auto.choose(str(folder), "60s", CPU).recipe
    before = recipe.before()
    assert before is not None
    assert (before.method, before.model, before.data) == ("mae", recipe.model, recipe.data)
    epochs = before.schedule.epochs, recipe.schedule.epochs
    assert sum(epochs) * (49 // 32) * 32 == pytest.approx(60 * 320, rel=0.01)
    assert epochs[0] / sum(epochs) == pytest.approx(auto.PAINTED, rel=0.01)


def test_larger_images_learn_by_gentler_rates(monkeypatch, folder, swift):
    small = auto.choose(str(folder), "60s", CPU).recipe
    monkeypatch.setattr(auto, "looked_at", lambda *_: iter([(np.zeros((8, 8, 3), np.uint8), (500, 375))] * 4))
    large = auto.choose("scenes:3000", "20min", CPU).recipe
    for recipe, rate in ((small, 8e-4), (large, 5e-4)):
        before = recipe.before()
        assert before is not None
        assert (before.optim.lr, recipe.optim.lr) == (rate, rate)
        assert recipe.model.init == "xavier"


@pytest.mark.parametrize(
    ("steps", "momenta"), [(12_500, (0.997, 0.9995)), (1_600, (0.996, 0.998)), (10, (0.996, 0.998))]
)
def test_the_average_is_over_what_was_seen_to_work(steps, momenta):
    """The values of ijepa_cifar10_alone_cpu and of ijepa_scenes, which were found by trying."""
    assert auto.momenta(steps) == pytest.approx(momenta, abs=1e-4)


@pytest.mark.parametrize("steps", [10_000, 10**6, 10**8])
def test_a_long_run_averages_over_its_share_and_never_stands_still(steps):
    for momentum, share in zip(auto.momenta(steps), (0.027, 0.16), strict=True):
        assert 1 / (1 - momentum) / steps == pytest.approx(share, rel=0.06)


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (20, 20), (40, 32)])
def test_few_images_are_a_batch_and_are_looked_at_seldom(swift, images, batch):
    recipe = auto.choose(f"scenes:{images}", "20min", CPU).recipe
    assert recipe.data.batch_size == batch
    before = recipe.before()
    assert before is not None
    for run, looks in ((before, auto.PAINTING_LOOKS), (recipe, auto.LOOKS)):
        assert run.schedule.epochs / run.monitors.knn_every == pytest.approx(looks)
        assert looks <= run.schedule.epochs / run.machine.checkpoint_every <= 1.01 * looks


def test_looks_take_a_small_part_and_checkpoints_come_every_ten_minutes(swift):
    recipe = auto.choose("scenes:4000", "5h", CPU).recipe
    seconds = 0.8 * 5 * 3600
    assert recipe.schedule.epochs / recipe.machine.checkpoint_every == pytest.approx(seconds / 600)
    for time, looks in (("5min", 4), ("10min", 9), ("1h", 10)):  # a look of few images would tell nothing: rather fewer
        short = auto.choose("scenes:4000", time, CPU).recipe
        assert short.schedule.epochs / short.monitors.knn_every == pytest.approx(looks)
        assert auto.LOOK_LEAST <= short.monitors.knn_images <= 4000
        before = short.before()
        assert before is not None
        assert before.monitors.knn_images == short.monitors.knn_images  # or the two could not be compared
    assert auto.choose("scenes:4000", "60s", CPU).recipe.monitors.knn_every == 0


def test_larger_images_on_a_gpu_are_seen_larger(monkeypatch, swift):
    monkeypatch.setattr(auto, "looked_at", lambda *_: iter([(np.zeros((8, 8, 3), np.uint8), (500, 375))] * 4))
    monkeypatch.setattr(auto, "pick_device", lambda name: torch.device("cuda"))
    recipe = auto.choose("scenes:300", "20min").recipe
    assert (recipe.data.batch_size, recipe.masking.strategy) == (128, "multiblock")  # a grid of 14x14
    assert (recipe.model.image_size, recipe.model.patch_size, recipe.model.size) == ((224, 224), 16, "S")


def test_too_little_time_is_said(folder, swift):
    (why,) = (why for what, why in auto.choose(str(folder), "10s", CPU).reasons if what.startswith("then"))
    assert "give it more time" in why
    (why,) = (why for what, why in auto.choose(str(folder), "1h", CPU).reasons if what.startswith("then"))
    assert "give it more time" not in why


def test_values_that_are_told_are_measured_and_hold(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(auto, "pace", lambda recipe, *_: seen.append(recipe) or 320.0)
    told = {**CPU, "data.batch_size": "16", "model.init": "normal", "first.optim.lr": "3e-4", "data.max_bad": "0.9"}
    found = auto.choose(str(folder), "60s", told)
    before = found.recipe.before()
    assert before is not None
    assert [run.data.batch_size for run in (*seen, before, found.recipe)] == [16] * 4
    assert [run.optim.lr for run in (seen[0], before, seen[1], found.recipe)] == [3e-4, 3e-4, 8e-4, 8e-4]
    assert found.recipe.schedule.epochs * (49 // 16) * 16 == pytest.approx(0.8 * 60 * 320, rel=0.01)
    assert dict(found.reasons)["batches of 16"] == "as told"
    assert dict(found.reasons)["a predictor that begins with normal weights"] == "as told"
    (large,) = {run.model.grid for run in (auto.choose(str(folder), "60s", {"model.image_size": "64"}).recipe,)}
    assert large == (8, 8)  # of patches as large as 64 pixels want them


def test_without_painting_all_the_time_is_of_the_rest(folder, swift):
    found = auto.choose(str(folder), "60s", {**CPU, "first": "{}"})
    assert found.recipe.before() is None
    assert found.recipe.schedule.epochs * (49 // 32) * 32 == pytest.approx(60 * 320, rel=0.01)
    assert not any("painting" in what for what, _ in found.reasons)


def test_a_run_too_short_to_look_at_is_not_looked_at(folder, swift):
    assert auto.choose(str(folder), "1s", CPU).recipe.monitors.knn_every == 0
    assert auto.choose(str(folder), "5s", CPU).recipe.monitors.knn_every > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.lrr", "3"], "did you mean 'optim.lr'"),
        (["--first.nonsense", "3"], "'first.nonsense'"),
        (["--model.patch_size", "7"], "7"),
        (["--masking.strategy", "nonsense"], "masking.strategy is 'nonsense'"),
        (["--data.batch_size", "400"], "larger than the data set of 49 images"),
        (["--schedule.epochs", "3"], "the budget says how long"),
        (["--method", "mae"], "for ijepa alone"),
        (["--init_from", "nowhere"], "leave one out"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(folder, monkeypatch, capsys, tmp_path, words, says):
    def measured(*_):
        raise AssertionError

    monkeypatch.setattr(auto, "pace", measured)
    assert says in refused(monkeypatch, capsys, *asked(folder, tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_more_bad_images_may_be_allowed_once_they_are_named(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(budget, "PACE_STEPS", 4)
    for i in range(20):
        (folder / f"broken-{i}.png").write_bytes(b"no image")
    words = asked(folder, tmp_path / "run")
    status, _, said = command(monkeypatch, capsys, *words)
    assert status == 2
    assert f"all are in {tmp_path / 'run' / 'first' / 'bad_images.txt'}" in said
    assert (tmp_path / "run" / "first" / "bad_images.txt").exists()
    assert command(monkeypatch, capsys, *words, "--data.max_bad", "0.9")[0] == 0


def test_what_it_prints_is_a_recipe_with_its_reasons(folder, swift, monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, "recipes", "ijepa_auto", "--data", str(folder), "--budget", "60s")
    assert status == 0
    assert out.startswith("# images of 32x32 pixels: ")
    assert "the shorter side's median is 40" in out
    assert from_dict(Recipe, yaml.safe_load(out)) == auto.choose(str(folder), "60s").recipe


def test_a_run_of_it_goes_on_with_what_was_chosen(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(budget, "PACE_STEPS", 4)
    words = asked(folder, tmp_path / "run")
    status, out, _ = command(monkeypatch, capsys, *words)
    assert status == 0
    assert "images/s here" in out
    assert saved_recipe(tmp_path / "run" / "first").method == "mae"
    chosen = saved_recipe(tmp_path / "run")
    assert "30min or 2h" in refused(monkeypatch, capsys, *words, "--budget", "soon")
    status, out, _ = command(monkeypatch, capsys, *words, "--budget", "1h")
    assert status == 0
    assert "goes on by the recipe that it began with; another budget wants another --out" in out
    assert "images/s here" not in out
    assert saved_recipe(tmp_path / "run") == chosen


def test_a_stop_while_it_paints_goes_on_with_what_was_chosen(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(auto, "pace", lambda recipe, *_: 32 * 25.0)
    words = asked(folder, tmp_path / "run")
    real = Run.log

    def log(run, step, *more, **named):
        if run.path.name == "first" and step == 2:
            run.signal = signal.SIGTERM
        real(run, step, *more, **named)

    monkeypatch.setattr(Run, "log", log)
    status, _, said = command(monkeypatch, capsys, *words)
    assert status == 75
    assert "the same command goes on" in said
    chosen, stopped_at = saved_recipe(tmp_path / "run"), checkpoints(tmp_path / "run" / "first")[-1].step
    assert 0 < stopped_at < 5
    monkeypatch.setattr(Run, "log", real)
    monkeypatch.setattr(auto, "pace", lambda recipe, *_: 32 * 50.0)  # the machine has another mood
    assert command(monkeypatch, capsys, *words)[0] == 0
    assert saved_recipe(tmp_path / "run") == chosen
    assert checkpoints(tmp_path / "run" / "first")[-1].step == 5
    assert checkpoints(tmp_path / "run")[-1].step == 20


def test_the_device_that_is_asked_for_is_measured(folder, monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(auto, "pace", lambda recipe, *_: asked.append(recipe.machine.device) or 32.0)
    words = ["--data", str(folder), "--out", str(tmp_path / "run"), "--budget", "1s", "--machine.device", "cpu"]
    assert command(monkeypatch, capsys, "pretrain", "--recipe", "ijepa_auto", *words)[0] == 0
    assert asked == ["cpu", "cpu"]


def test_bad_input(folder, monkeypatch, capsys, tmp_path):
    run = ["--out", str(tmp_path / "run")]
    auto_ = ["pretrain", "--recipe", "ijepa_auto", *run]
    assert "choose" in refused(monkeypatch, capsys, *auto_)
    assert "30min or 2h" in refused(monkeypatch, capsys, *auto_, "--data", str(folder), "--budget", "soon")
    assert "--budget is of ijepa_auto" in refused(
        monkeypatch, capsys, "pretrain", "--recipe", "ijepa_scenes", "--data", "scenes:40", *run, "--budget", "1min"
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").write_bytes(b"no image")
    for data, told in (("none", "could be read"), ("images", "images exists and is not a run")):
        at = ["--out", str(tmp_path / data)] if data == "images" else run
        words = [*auto_[:3], *at, "--data", str(tmp_path / data)]
        status, _, said = command(monkeypatch, capsys, *words)
        assert status == 2
        assert told in said.splitlines()[-1]
    told = refused(monkeypatch, capsys, *auto_, "--data", str(folder), "--slurm.nodes", "1")
    assert "openjepa recipes ijepa_auto --data SPEC > recipe.yaml" in told

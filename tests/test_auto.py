"""ijepa_auto: what it chooses, why, and that it is a recipe like any other."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from openjepa.recipes import auto, budget
from openjepa.recipes.pretrain import saved_recipe
from openjepa.recipes.recipe import Recipe, from_dict
from tests.helpers import command, refused


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


def test_it_looks_at_the_images(folder, swift):
    recipe = auto.choose(str(folder), "60s", "cpu").recipe
    assert recipe.model.image_size == (32, 32)  # the shorter side is 40
    assert recipe.model.grid == (8, 8)
    assert recipe.data.mean == pytest.approx((39.5 / 255,) * 3, abs=0.01)
    assert all(0.02 <= std <= 40 / 12**0.5 / 255 for std in recipe.data.std)  # of noise, which resizing smooths


def test_it_fills_the_time(folder, swift):
    recipe = auto.choose(str(folder), "60s", "cpu").recipe
    before = recipe.before()
    assert before is not None
    assert (before.method, before.model, before.data) == ("mae", recipe.model, recipe.data)
    epochs = before.schedule.epochs, recipe.schedule.epochs
    assert sum(epochs) * (49 // recipe.data.batch_size) * recipe.data.batch_size == pytest.approx(60 * 320, rel=0.01)
    assert epochs[0] / sum(epochs) == pytest.approx(auto.PAINTED, rel=0.01)


def test_larger_images_learn_by_gentler_rates_and_after_their_predictor(monkeypatch, folder, swift):
    small = auto.choose(str(folder), "60s", "cpu").recipe
    monkeypatch.setattr(auto, "looked_at", lambda *_: iter([(np.zeros((8, 8, 3), np.uint8), (500, 375))] * 4))
    large = auto.choose("scenes:3000", "20min", "cpu").recipe
    for recipe, rate in ((small, 8e-4), (large, 5e-4)):
        before = recipe.before()
        assert before is not None
        assert (before.optim.lr, recipe.optim.lr) == (rate, rate)
    steps_per_epoch = 3000 // 32
    assert large.predictor.alone_epochs * steps_per_epoch == pytest.approx(auto.ALONE, abs=1)
    assert 0 < small.predictor.alone_epochs < small.schedule.epochs / 9


@pytest.mark.parametrize(
    ("steps", "momenta"), [(12_500, (0.997, 0.9995)), (1_600, (0.996, 0.998)), (10, (0.996, 0.998))]
)
def test_the_average_is_over_what_was_seen_to_work(steps, momenta):
    """The values of ijepa_cifar10_cpu and of ijepa_scenes, which were found by trying."""
    assert auto.momenta(steps) == pytest.approx(momenta, abs=1e-4)


def test_larger_images_on_a_gpu_are_seen_larger(monkeypatch, swift):
    monkeypatch.setattr(auto, "looked_at", lambda *_: iter([(np.zeros((8, 8, 3), np.uint8), (500, 375))] * 4))
    monkeypatch.setattr(auto, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(auto, "pick_precision", lambda name, device: "bf16")
    recipe = auto.choose("scenes:300", "20min").recipe
    assert (recipe.model.image_size, recipe.model.patch_size, recipe.model.size) == ((224, 224), 16, "S")


def test_too_little_time_is_said(folder, swift):
    (why,) = (why for what, why in auto.choose(str(folder), "10s", "cpu").reasons if " steps, " in what)
    assert "give it more time" in why
    (why,) = (why for what, why in auto.choose(str(folder), "1h", "cpu").reasons if " steps, " in what)
    assert "give it more time" not in why


def test_what_it_prints_is_a_recipe_with_its_reasons(folder, swift, monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, "recipes", "ijepa_auto", "--data", str(folder), "--budget", "60s")
    assert status == 0
    assert out.startswith("# images of 32x32 pixels: ")
    assert from_dict(Recipe, yaml.safe_load(out)) == auto.choose(str(folder), "60s").recipe


def test_a_run_of_it_goes_on_with_what_was_chosen(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(budget, "PACE_STEPS", 4)
    words = [
        "pretrain",
        "--recipe",
        "ijepa_auto",
        "--data",
        str(folder),
        "--out",
        str(tmp_path / "run"),
        "--budget",
        "1s",
    ]
    status, out, _ = command(monkeypatch, capsys, *words)
    assert status == 0
    assert "images/s here" in out
    assert saved_recipe(tmp_path / "run" / "first").method == "mae"
    chosen = saved_recipe(tmp_path / "run")
    status, out, _ = command(monkeypatch, capsys, *words)
    assert status == 0
    assert "images/s here" not in out
    assert saved_recipe(tmp_path / "run") == chosen


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
    assert "could be read" in refused(monkeypatch, capsys, *auto_, "--data", str(tmp_path / "none"))

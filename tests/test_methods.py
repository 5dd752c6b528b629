"""Claims about all methods alike: they train, resume, are loaded and reported by the same engine; recipes keep them apart."""

import __future__

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console

import openjepa
from openjepa.bench import compare as bench
from openjepa.data.augment import NUMBERS, AugmentConfig, augment
from openjepa.data.sources import open_source
from openjepa.data.stream import Steps, batches
from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import read_metrics
from openjepa.errors import UserError
from openjepa.recipes import budget, methods
from openjepa.recipes.methods import METHODS
from openjepa.recipes.named import RECIPES
from openjepa.recipes.pretrain import build, pretrain, saved_recipe, share_of
from openjepa.recipes.recipe import Recipe, from_dict, from_yaml, override, to_dict, to_yaml
from openjepa.recipes.replay import dump, replay
from openjepa.recipes.report import report
from tests.conftest import OWN, recipe_of
from tests.helpers import command, refused, same


@pytest.fixture(scope="module", params=["mae", "ibot"])
def trained(request, folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "run"
    pretrain(recipe_of(request.param), str(folder), out, Console(quiet=True))
    return out


def test_a_stopped_run_ends_in_the_same_bits(trained, folder, tmp_path):
    for stop in (2, 6):  # iBOT's prototypes rest in the first, and have no optimiser state yet
        again = tmp_path / f"from-{stop}"
        shutil.copytree(trained, again)
        for found in checkpoints(again):
            if found.step > stop:
                shutil.rmtree(found.path)
        pretrain(saved_recipe(again), str(folder), again, Console(quiet=True))
        ours, theirs = checkpoints(again)[-1], checkpoints(trained)[-1]
        assert ours.step == theirs.step == 10
        assert same(ours.weights(), theirs.weights())
        assert same(ours.optimizer(), theirs.optimizer())


def test_workers_make_the_batches_of_the_main_process(folder):
    recipe = recipe_of("ibot")
    steps = Steps(open_source(str(folder)), recipe.data, METHODS["ibot"].views(recipe), 0)
    for mine, theirs in zip((steps.batch(0), steps.batch(1)), batches(steps, 0, 2, 1, pin=False), strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.small, theirs.small)
        assert torch.equal(mine.masks.hidden, theirs.masks.hidden)
    assert mine.images.shape == (8, 2, 3, 32, 32)
    assert mine.small.shape == (8, 2, 3, 16, 16)
    assert not torch.equal(mine.images[:, 0], mine.images[:, 1])
    halves = mine.parts(2)
    assert sum(half.masks.total for half in halves) == mine.masks.total


def test_dino_hides_nothing(folder):
    recipe = override(recipe_of("ibot"), {"ibot.patch_weight": "0"})
    steps = Steps(open_source(str(folder)), recipe.data, METHODS["ibot"].views(recipe), 0)
    assert [steps.batch(step).masks.total for step in range(3)] == [0, 0, 0]


def test_what_was_trained_is_loaded_evaluated_and_drawn(trained, folder):
    name = saved_recipe(trained).method
    encoder = openjepa.load(trained)
    assert encoder.network == {"mae": "encoder", "ibot": "target_encoder"}[name]
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 24)
    assert report(trained).exists()
    logged = read_metrics(trained)[-2]
    assert ("hidden_tokens" in logged) == (name == "ibot")
    assert ("encoder_distance" in logged) == (name == "ibot")  # nothing follows MAE's encoder
    if name == "mae":
        with pytest.raises(UserError, match="a run of mae, which has no target_encoder"):
            openjepa.load(trained, network="target_encoder")
        with pytest.raises(UserError, match="a run of mae"):
            openjepa.recipes.exchange.export(str(trained), "safetensors", trained.parent / "out", "predictor")


@pytest.mark.parametrize("name", OWN)
def test_a_kept_step_is_computed_once_more(name, folder, tmp_path):
    recipe = recipe_of(name)
    method = build(recipe).train()
    batch = Steps(open_source(str(folder)), recipe.data, METHODS[name].views(recipe), 0).batch(0)
    batch.images[3] = 0
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad])
    kept = dump(tmp_path, recipe, 0, 0.0, batch, "image {}".format, method, optimizer)
    lines = list(replay(kept))
    assert lines[-1] == "all losses are finite here"
    assert "gradient norm" in lines[1]


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", OWN)
def test_recipes_hold_their_own_method_alone(name):
    recipe = recipe_of(name)
    values = to_dict(recipe)
    assert set(OWN[name]) <= set(values)
    for other in set(METHODS) - {name}:
        assert not (set(METHODS[other].parts) - set(METHODS[name].parts)) & set(values)
    assert from_dict(Recipe, from_yaml(to_yaml(recipe))) == recipe


def test_another_method_begins_at_its_own_values():
    recipe = override(recipe_of("ijepa"), {"method": "mae", "mae.decoder_depth": "2"})
    assert (recipe.masking.strategy, recipe.masking.hidden) == ("random", 0.75)
    assert recipe.model.class_token
    assert recipe.model.width == 24  # what they share stays
    assert recipe.mae.decoder_depth == 2
    assert recipe.augment == recipe_of("ijepa").augment
    ibot = override(recipe_of("ijepa"), {"method": "ibot"})
    assert methods.small_crop(ibot) == (16, 16)
    painted_first = override(RECIPES["ijepa_cifar10_cpu"](), {"method": "ibot"})
    assert painted_first.before() is None  # its encoder has no class token
    assert ibot.augment.jitter == (0.4, 0.4, 0.2, 0.1)  # views that differ by their place alone would agree at once


@pytest.mark.parametrize(
    ("values", "small", "rise", "frozen"),
    [
        ({}, 96, 29, 1),  # 300 epochs of 224 pixels: as published
        ({"schedule": {"epochs": 40, "warmup_epochs": 5}}, 96, 10, 1),
        ({"schedule": {"epochs": 4, "warmup_epochs": 1}, "model": {"image_size": 32, "patch_size": 4}}, 16, 1, 0.5),
        ({"model": {"image_size": 96, "patch_size": 12}}, 48, 29, 1),
    ],
)
def test_what_ibot_is_not_told_follows_from_the_images_and_the_length_of_the_run(values, small, rise, frozen):
    recipe = from_dict(Recipe, {"method": "ibot", **values})
    assert methods.small_crop(recipe) == (small, small)
    of_run = recipe.ibot.of_run(recipe.schedule.epochs)
    assert (of_run.temperature_epochs, of_run.freeze_last_layer_epochs) == (rise, frozen)
    on_the_command_line = override(RECIPES["ijepa_cifar10_alone_cpu"](), {"method": "ibot", "schedule.epochs": "1"})
    assert build(on_the_command_line).config.freeze_last_layer_epochs == 0.125


def test_more_crops_than_a_process_can_hold_are_refused(folder, tmp_path):
    recipe = override(recipe_of("ibot"), {"crops.small": "60", "data.batch_size": "200000"})
    told = r"2 of 32x32 and 60 of 16x16, have 3\.5 billion pixels, more than 2: lower crops\.small"
    with pytest.raises(UserError, match=told):
        pretrain(recipe, str(folder), tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()
    share_of(recipe, 0, 2)  # two processes can
    share_of(override(recipe, {"optim.accumulate": "2"}), 0, 1)


def test_images_of_four_channels_are_distorted_but_for_their_alpha():
    image = np.dstack([np.random.default_rng(0).integers(0, 256, (32, 32, 3)), np.arange(1024).reshape(32, 32) % 251])
    config = AugmentConfig(crop_scale=(1, 1), crop_aspect=(1, 1), jitter=(0.4, 0.4, 0.2, 0.1), grey=1.0, solarise=1.0)
    numbers = np.full(NUMBERS, 0.3)
    found = augment(image.astype(np.uint8), config, (32, 32), 4, numbers)
    assert np.array_equal(found[..., 3], image[..., 3])
    assert np.array_equal(found[..., :3], augment(image[..., :3].astype(np.uint8), config, (32, 32), 3, numbers))


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("ijepa", {"mae.decoder_depth": "2"}, "'mae' is a part of mae, and this recipe's method is ijepa"),
        ("mae", {"predictor.depth": "2"}, "'predictor' is a part of ijepa, and this recipe's method is mae"),
        ("mae", {"crops.small": "2"}, "'crops' is a part of ibot"),
        ("ibot", {"masking.hidden": "0.5"}, "'masking' is a part of ijepa and mae"),
        ("ijepa", {"method": "mea"}, "did you mean 'mae'"),
        ("mae", {"masking.hidden": "1"}, "hide some and leave some"),
        ("mae", {"masking.hidden": "0"}, "hide some and leave some"),
        ("mae", {"masking.hidden": "0.999"}, "masking.hidden 0.999 hides 64"),
        ("mae", {"masking.strategy": "multiblock"}, "masking.strategy random or block"),
        ("mae", {"mae.decoder_heads": "5"}, "divisible by mae.decoder_heads"),
        ("ibot", {"crops.small_size": "18,16"}, "crops.small_size 18x16 does not divide into patches of 4"),
        ("ibot", {"crops.small": "65"}, "crops.small is 65"),
        ("ibot", {"crops.small_size": "32,32"}, "crops.small_size 32x32 is no smaller than the large crops, 32x32"),
        (
            "ibot",
            {"ibot.temperature_epochs": "3"},
            "ibot.temperature_epochs (3) must be no longer than the run (2 epochs)",
        ),
        ("ibot", {"model.image_size": "8,128"}, "no rectangle fits in 32% of the crops: raise it"),
        (
            "ibot",
            {"model.image_size": "4,128", "crops.small": "0"},
            "no rectangle is smaller than a 1x32 grid: use random",
        ),
        ("ibot", {"ibot.freeze_last_layer_epochs": "2"}, "no prototype would move"),
        ("mae", {"masking.targets": "7"}, "masking.targets says nothing to mae"),
        ("mae", {"masking.strategy": "block", "masking.hidden": "0.01"}, "masking.hidden 0.009 to 0.011 of a 8x8 grid"),
        ("ibot", {"model.class_token": "false"}, "set model.class_token true"),
        ("ibot", {"token_masking.hidden": "0.001,0.002"}, "hides no patch"),
        ("ibot", {"token_masking.masked": "0"}, "token_masking.masked 0 hides no patch"),
        ("ibot", {"token_masking.masked": "-1"}, "a share is between 0 and 1"),
        ("ibot", {"token_masking.hidden": "0.5,1"}, "hide some and leave some"),
        ("ibot", {"ibot.teacher_temperature": "0"}, "must be above 0"),
        ("ibot", {"ibot.prototypes": "100000000000"}, "must be between 1 and 1,048,576"),
        ("ibot", {"ibot.freeze_last_layer_epochs": "-1"}, "ibot.freeze_last_layer_epochs not negative"),
        ("ibot", {"optim.clip_each": "-1"}, "optim.clip_each is -1"),
        ("ijepa", {"loss.target": "pixels", "loss.target_mask": "input"}, "leave one out"),
    ],
)
def test_what_does_not_go_together_is_refused(name, values, told):
    with pytest.raises(UserError, match=re.escape(told)):
        override(recipe_of(name), values)


def test_refusals_reach_the_command_line(monkeypatch, capsys):
    told = refused(
        monkeypatch, capsys, "pretrain", "--recipe", "mae_cifar10_cpu", "--loss.kind", "l2", "--data", "x", "--out", "y"
    )
    assert "'loss' is a part of ijepa, and this recipe's method is mae" in told


# ---------------------------------------------------------------- the paper's ablations


def test_pixels_can_be_the_targets(folder, tmp_path):
    recipe = recipe_of("ijepa", loss={"target": "pixels"}, schedule={"epochs": 1, "warmup_epochs": 0})
    method = build(recipe)
    images = torch.randn(8, 3, 32, 32)
    masks = Steps(open_source(str(folder)), recipe.data, METHODS["ijepa"].views(recipe), 0).batch(0).masks
    targets = method.targets(images, masks)
    assert targets.shape == (*masks.targets.shape, 48)
    patch = int(masks.targets[2, 1, 0])
    row, column = 4 * (patch // 8), 4 * (patch % 8)
    pixels = images[2, :, row : row + 4, column : column + 4].flatten()
    assert torch.allclose(targets[2, 1, 0], (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt(), atol=1e-5)
    pretrain(recipe, str(folder), tmp_path / "run", Console(quiet=True))


def test_the_target_encoders_input_can_be_masked(folder):
    recipe = recipe_of("ijepa", loss={"target_mask": "input"})
    method = build(recipe)
    batch = Steps(open_source(str(folder)), recipe.data, METHODS["ijepa"].views(recipe), 0).batch(0)
    images = batch.images.float()
    targets = method.targets(images, batch.masks)
    block = batch.masks.targets[:1, 2]
    alone = method.target_encoder(images[:1], block)
    assert torch.allclose(targets[0, 2], torch.nn.functional.layer_norm(alone[0], (24,)), atol=1e-5)
    elsewhere = images.clone()
    outside = next(i for i in range(64) if i not in block[0])
    elsewhere[0, :, 4 * (outside // 8) : 4 * (outside // 8) + 4, 4 * (outside % 8) : 4 * (outside % 8) + 4] += 50
    assert torch.equal(method.targets(elsewhere, batch.masks)[0, 2], targets[0, 2])  # it sees the block alone


# ---------------------------------------------------------------- a method of one's own


def test_the_page_on_adding_a_method_is_true(folder, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "adding-a-method.md").read_text()
    monkeypatch.setattr(budget, "PACE_STEPS", 4)
    monkeypatch.setattr(bench, "PROBE", replace(bench.PROBE, lrs=(0.1,), epochs=2, min_steps=10))
    module, entry = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    added = ModuleType("openjepa.methods.data2vec")
    exec(module, vars(added))
    monkeypatch.setitem(sys.modules, added.__name__, added)
    small = [
        "--model.width",
        "24",
        "--model.heads",
        "2",
        "--model.depth",
        "2",
        "--data.batch_size",
        "8",
        "--optim.lr",
        "1e-3",
    ]
    try:
        there = compile(
            entry, "methods.py", "exec", __future__.annotations.compiler_flag
        )  # as if it were written there
        exec(there, dict(vars(methods)))
        pretraining, comparing = re.findall(r"^openjepa (.*)$", page, re.MULTILINE)
        words = pretraining.replace("SPEC", str(folder)).replace("runs/data2vec", str(tmp_path / "run")).split()
        times = ["--schedule.epochs", "2", "--schedule.warmup_epochs", "0.5", "--monitors.log_every", "1"]
        assert command(monkeypatch, capsys, *words, *small, *times)[0] == 0
        losses = [m["loss"] for m in read_metrics(tmp_path / "run") if "loss" in m]
        assert losses[-1] < losses[0]
        assert openjepa.load(tmp_path / "run").network == "target_encoder"
        assert "coloured ones asked for" in report(tmp_path / "run").read_text()
        words = comparing.replace("SPEC", str(folder)).replace("10min", "1s").split()
        status, said, _ = command(monkeypatch, capsys, *words, "--json", "--looks", "1", *small)
        assert status == 0
        assert "method=data2vec" in {row["who"].partition(":")[2].partition(":")[0] for row in json.loads(said)["rows"]}
    finally:
        METHODS.pop("data2vec", None)

"""Claims about recipes: nothing unread, nothing unknown, nothing lost between YAML and back."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import openjepa
from openjepa.errors import UserError
from openjepa.recipes.methods import small_crop
from openjepa.recipes.named import RECIPES
from openjepa.recipes.recipe import Recipe, all_keys, differences, from_dict, override, to_dict, to_yaml


def test_every_field_is_read_somewhere():
    read = set()
    for file in Path(openjepa.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert [key for key in all_keys() if key.rpartition(".")[2] not in read] == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_yaml(name):
    recipe = RECIPES[name]()
    assert from_dict(Recipe, yaml.safe_load(to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim.lrr": "1"}, "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ({"optin.lr": "1"}, "unknown key 'optin'"),
        ({"lr": "1"}, "unknown key 'lr'"),
        ({"masking.strategy": "multi"}, "masking.strategy is 'multi': one of"),
        ({"optim.lr": "fast"}, "optim.lr is 'fast': expected float"),
        ({"optim.lr": "0"}, "optim.lr is 0"),
        ({"masking.targets": "2.5"}, "expected int"),
        ({"masking.target_scale": "[0.1]"}, "expected 2 numbers"),
        ({"model": "big"}, "expected keys and values"),
        ({"model.patch_size": "7"}, "does not divide"),
        ({"masking.targets": "60"}, "60 targets"),
        ({"schedule.warmup_epochs": "1000"}, "must be shorter"),
        ({"data.batch_size": "9", "optim.accumulate": "2"}, "divisible"),
        ({"model.channels": "1"}, "data.mean has 3 numbers"),
        ({"masking.context": "packed", "model.registers": "2"}, "does not go with"),
        ({"model.init": "xaver"}, "xavier"),
        ({"masking.context": "packed", "predictor.context": "shared"}, "does not go with predictor.context"),
        ({"seed": "-1"}, "seed"),
        ({"precision": "fp4"}, "precision is 'fp4'"),
        ({"optim.lr": ".nan"}, "expected a finite number"),
        ({"schedule.epochs": ".inf"}, "expected a finite number"),
        ({"optim.lr": "1e-6"}, "is the highest rate"),
        ({"optim": "3", "optim.lr": "1"}, "was given a value of its own"),
        ({"data.std": "[]"}, "data.mean and data.std"),
        ({"model.image_size": "-32"}, "at least 1"),
        ({"masking.strategy": "rasterized", "masking.min_keep": "40"}, "a quadrant"),
        ({"loss.variance": "1", "data.batch_size": "2", "optim.accumulate": "2"}, "parts of 2 images"),
    ],
)
def test_mistakes_are_refused_by_their_path(tiny, changes, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        override(tiny, changes)
    assert "\n" not in str(error.value)


def test_overrides_change_what_they_name_and_nothing_else(tiny):
    changed = override(tiny, {"optim.lr": "2e-3", "masking.target_scale": "[0.15, 0.25]", "optim.clip_norm": "1"})
    assert changed.optim.lr == 2e-3
    assert changed.masking.target_scale == (0.15, 0.25)
    assert {d.split(":")[0] for d in differences(tiny, changed)} == {
        "optim.lr",
        "masking.target_scale",
        "optim.clip_norm",
    }


def test_a_size_brings_its_own_width():
    recipe = override(RECIPES["ijepa_scenes"](), {"model.size": "S"})
    assert (recipe.model.width, recipe.model.depth, recipe.model.heads) == (384, 12, 6)


PUBLISHED = {  # as their papers and released commands have it
    "mae_vitb16": {
        "data.batch_size": 4096, "optim.lr": 2.4e-3, "optim.start_lr": 0.0, "optim.final_lr": 0.0, "optim.betas": (0.9, 0.95),
        "optim.weight_decay": 0.05, "optim.final_weight_decay": 0.05, "optim.clip_each": None, "schedule.epochs": 1600,
        "schedule.warmup_epochs": 40, "masking.strategy": "random", "masking.hidden": 0.75, "augment.crop_scale": (0.2, 1.0),
        "augment.resize": "bicubic", "augment.flip": 0.5, "augment.blur": 0.0, "mae.decoder_width": 512, "mae.decoder_depth": 8,
        "mae.decoder_heads": 16, "model.class_token": True,
    },
    "ibot_vits16": {
        "data.batch_size": 1024, "optim.lr": 2e-3, "optim.start_lr": 0.0, "optim.final_lr": 1e-6, "optim.weight_decay": 0.04,
        "optim.final_weight_decay": 0.4, "optim.clip_each": 3.0, "schedule.epochs": 800, "schedule.warmup_epochs": 10,
        "schedule.ema": (0.996, 1.0), "schedule.ema_shape": "cosine", "augment.crop_scale": (0.25, 1.0), "augment.blur": 1.0,
        "augment.jitter": (0.4, 0.4, 0.2, 0.1), "augment.grey": 0.2, "augment.resize": "bicubic", "crops.second_blur": 0.1,
        "crops.second_solarise": 0.2, "crops.small": 10, "crops.small_size": (96, 96), "crops.small_scale": (0.05, 0.25),
        "crops.small_blur": 0.5, "ibot.prototypes": 8192, "ibot.hidden": 2048, "ibot.bottleneck": 256,
        "ibot.student_temperature": 0.1, "ibot.first_temperature": 0.04, "ibot.teacher_temperature": 0.07,
        "ibot.patch_temperature": 0.07, "ibot.temperature_epochs": 29, "ibot.freeze_last_layer_epochs": 1,
        "ibot.norm_last_layer": False, "ibot.centre_momentum": 0.9, "token_masking.hidden": (0.1, 0.5), "token_masking.masked": 0.5,
        "token_masking.shape": "block", "model.drop_path": 0.1,
    },
    "ibot_vitb16": {
        "optim.lr": 3e-3, "optim.final_lr": 2e-6, "optim.clip_each": 0.3, "schedule.epochs": 400, "augment.crop_scale": (0.32, 1.0),
        "crops.small_scale": (0.05, 0.32), "ibot.temperature_epochs": 49, "ibot.freeze_last_layer_epochs": 3,
        "ibot.norm_last_layer": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_values(name):
    recipe = RECIPES[name]()
    small = replace(recipe.crops, small_size=small_crop(recipe))
    recipe = replace(recipe, ibot=recipe.ibot.of_run(recipe.schedule.epochs), crops=small)
    for key, value in PUBLISHED[name].items():
        part, _, field = key.partition(".")
        found = getattr(getattr(recipe, part), field)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), key


def test_a_size_changed_in_yaml_brings_its_own_width():
    values = to_dict(RECIPES["ijepa_vitb16"]())
    values["model"]["size"] = "S"
    assert from_dict(Recipe, values).model.width == 384


def test_monitors_and_machine_change_no_result(tiny):
    changed = override(tiny, {"monitors.log_every": "7", "machine.workers": "2"})
    assert changed != tiny
    assert differences(tiny, changed) == []


def test_one_number_is_a_square_image(tiny):
    assert override(tiny, {"model.image_size": "64"}).model.image_size == (64, 64)


def test_to_dict_is_plain(tiny):
    assert yaml.safe_load(yaml.safe_dump(to_dict(tiny))) == to_dict(tiny)

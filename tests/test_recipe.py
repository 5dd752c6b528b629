"""Claims about recipes: nothing unread, nothing unknown, nothing lost between YAML and back."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import openjepa
from openjepa.errors import UserError
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
        ({"predictor.alone_epochs": "-1"}, "predictor.alone_epochs is -1.0: it must not be negative"),
        ({"predictor.alone_epochs": "999"}, "predictor.alone_epochs (999) must be shorter than the run"),
        ({"masking.context": "packed", "predictor.context": "shared"}, "does not go with predictor.context"),
        ({"seed": "-1"}, "seed"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
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

"""A run that begins with other weights than chance: another run's, those of a file, or those of a run of its own before it."""

import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from openjepa.engine.checkpoint import checkpoints
from openjepa.errors import UserError
from openjepa.recipes.beginning import begin_with
from openjepa.recipes.exchange import export, load_run
from openjepa.recipes.pretrain import build, pretrain, random_encoder
from openjepa.recipes.recipe import Recipe, differences, from_dict, from_yaml, override, to_yaml
from tests.conftest import recipe_of
from tests.helpers import command, imported, refused, same, weights

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def painted(folder, tmp_path_factory):
    """A short run of MAE, whose encoder is I-JEPA's."""
    run = tmp_path_factory.mktemp("painted") / "run"
    recipe = recipe_of("mae", model=recipe_of("ijepa").model.__dict__ | {"image_size": [32, 32]})
    pretrain(replace(recipe, schedule=replace(recipe.schedule, epochs=0.6, warmup_epochs=0)), str(folder), run, QUIET)
    return run


def begun(source, recipe):
    method = build(recipe)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    said = begin_with(method, recipe, str(source))
    return method, before, said


def test_both_encoders_begin_with_the_encoder_of_another_method(painted):
    method, before, said = begun(painted, recipe_of("ijepa"))
    theirs = load_run(painted).method.encoder.state_dict()
    assert same(method.encoder.state_dict(), theirs)
    assert same(method.target_encoder.state_dict(), theirs)
    assert torch.equal(method.predictor.mask_token, before["predictor.mask_token"])
    assert said == f"beginning with {painted}: encoder, target_encoder; anew: predictor"


def test_all_networks_begin_with_those_of_the_same_method(painted, folder, tmp_path):
    pretrain(replace(recipe_of("ijepa"), init_from=str(painted)), str(folder), tmp_path / "run", QUIET)
    method, _, said = begun(tmp_path / "run", replace(recipe_of("ijepa"), seed=7))
    assert same(method.state_dict(), weights(tmp_path / "run"))
    assert "anew" not in said


def test_a_file_is_a_beginning_as_a_run_is(painted, tmp_path):
    export(str(painted), "safetensors", tmp_path / "out")
    of_file, _, _ = begun(tmp_path / "out" / "encoder.safetensors", recipe_of("ijepa"))
    of_run, _, _ = begun(painted, recipe_of("ijepa"))
    assert same(of_file.state_dict(), of_run.state_dict())


def test_a_run_goes_on_when_its_beginning_is_gone(painted, folder, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(recipe_of("ijepa")))
    moved = tmp_path / "beginning"
    painted.rename(moved)
    words = ("pretrain", "--config", str(recipe), "--data", str(folder), "--out", str(tmp_path / "run"))
    status, said, _ = command(monkeypatch, capsys, *words, "--init_from", str(moved))
    assert status == 0
    assert "encoder, target_encoder; anew: predictor" in " ".join(said.split())
    moved.rename(painted)
    status, said, _ = command(monkeypatch, capsys, *words, "--init_from", str(moved))
    assert status == 0
    assert "beginning with" not in said
    assert "init_from" in refused(monkeypatch, capsys, *words)  # without it, it is another recipe


@pytest.mark.parametrize("change", [{"width": 32}, {"depth": 3}, {"class_token": True}])
def test_another_encoder_is_refused_by_what_differs(painted, change):
    recipe = recipe_of("ijepa")
    with pytest.raises(UserError, match=f"model.{next(iter(change))}"):
        begun(painted, replace(recipe, model=replace(recipe.model, **change)))


def test_what_is_not_there_is_refused_and_nothing_is_made(folder, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(recipe_of("ijepa")))
    error = refused(
        monkeypatch, capsys, "pretrain", "--config", str(recipe), "--data", str(folder), "--out", str(tmp_path / "run"),
        "--init_from", str(tmp_path / "nothing"))  # fmt: skip
    assert "nothing" in error
    assert not (tmp_path / "run").exists()


FIRST = {"method": "mae", "model": {"class_token": False}, "schedule": {"epochs": 0.6, "warmup_epochs": 0},
         "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """A recipe with a run before it, as a file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe_of("ijepa", first=FIRST)))
    return file


def test_a_run_of_its_own_comes_first_by_one_command(config, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ("pretrain", "--config", str(config), "--data", str(folder), "--out", str(out))
    status, said, _ = command(monkeypatch, capsys, *words)
    assert status == 0
    assert f"beginningwith{out}/first:encoder,target_encoder;anew:predictor" in "".join(
        said.split()
    )  # lines end anywhere
    before, after = load_run(out / "first"), load_run(out)
    assert (before.recipe.method, before.step, after.recipe.method, after.step) == ("mae", 3, "ijepa", 10)
    assert before.recipe.model == after.recipe.model
    assert "the encoder of run/first, a run of MAE, 0.6 epochs" in (out / "report.html").read_text()
    assert command(monkeypatch, capsys, *words)[0] == 0  # and there is nothing left to do


def test_a_stop_in_the_first_run_changes_nothing(config, folder, tmp_path):
    recipe = from_dict(Recipe, from_yaml(config.read_text()))
    pretrain(recipe, str(folder), tmp_path / "whole", QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints")
    for kept in checkpoints(tmp_path / "stopped" / "first")[1:]:
        shutil.rmtree(kept.path)
    pretrain(recipe, str(folder), tmp_path / "stopped", QUIET)
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_values_of_the_first_run_are_set_like_others(config):
    recipe = from_dict(Recipe, from_yaml(config.read_text()))
    changed = override(recipe, {"first.schedule.epochs": "0.4"})
    before = changed.before()
    assert before is not None
    assert (before.schedule.epochs, before.schedule.warmup_epochs) == (0.4, 0)  # what stands beside it stays
    assert differences(recipe, changed) == ["first.schedule.epochs: 0.6 -> 0.4"]


def test_only_what_changes_the_result_is_another_recipe(config):
    recipe = from_dict(Recipe, from_yaml(config.read_text()))
    changed = {"first.monitors.log_every": "7", "first.machine.workers": "1", "data.max_bad": "0.5"}
    assert differences(recipe, override(recipe, changed)) == []
    one, other = (override(recipe, {"first.optim.lr": text}) for text in ("5e-4", "0.0005"))
    assert differences(one, other) == []
    (told,) = differences(recipe, override(recipe, {"optim.lr": "0.3"}))  # of both, and told once
    assert told.startswith("optim.lr: ")
    assert [told.split(":")[0] for told in differences(recipe, override(recipe, {"first": "{}"}))] == ["first"]


def test_mistakes_of_the_first_run_leave_nothing(config, folder, tmp_path, monkeypatch, capsys):
    words = ("pretrain", "--config", str(config), "--data", str(folder), "--out", str(tmp_path / "run"))
    for name, value in (("data.batch_size", "500"), ("init_from", "nowhere"), ("schedule.epochs", "0")):
        assert "openjepa: first" in refused(monkeypatch, capsys, *words, f"--first.{name}", value)
        assert not (tmp_path / "run").exists()


def test_nothing_comes_first_where_it_is_taken_away(config):
    assert override(from_dict(Recipe, from_yaml(config.read_text())), {"first": "{}"}) == recipe_of("ijepa")


def test_imported_weights_take_no_other_beginning_beside_them(painted, tmp_path):
    export(str(painted), "safetensors", tmp_path / "out")
    with pytest.raises(UserError, match=r"--first \{\}"):
        imported(tmp_path / "out" / "encoder.safetensors", tmp_path / "run", recipe_of("ijepa", first=FIRST))


def test_random_weights_beside_it_are_those_of_the_first_run():
    recipe = recipe_of("ijepa", first=FIRST)
    before = recipe.before()
    assert before is not None
    assert same(random_encoder(recipe).vit.state_dict(), build(before).product.state_dict())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"first.optm.lr": "1"}, "'first.optim"),
        ({"first.method": "maa"}, "did you mean 'mae'"),
        ({"first.schedule.epochs": "-1"}, "above 0"),
        ({"init_from": "elsewhere"}, "leave one out"),
        ({"first.first.method": "mae"}, "one run"),
        ({"first": "3"}, "first is 3: expected keys and values"),
        ({"first.model": "3"}, "first.model is 3: expected keys and values"),
    ],
)
def test_mistakes_in_the_first_run_are_named(values, says):
    with pytest.raises(UserError, match=says):
        override(recipe_of("ijepa", first=FIRST), values)


def test_a_first_run_with_another_encoder_is_no_recipe():
    with pytest.raises(UserError, match=r"model\.depth: 1 -> 2"):
        recipe_of("ijepa", first={**FIRST, "model": {"class_token": False, "depth": 1}})


def test_a_comparison_refuses_what_another_run_paid_for(monkeypatch, capsys):
    words = ["--methods", "mae,ijepa:init_from=elsewhere", "--budget", "1s"]
    assert "begins with elsewhere, whose time would not count" in refused(
        monkeypatch, capsys, "bench", "compare", *words
    )

"""Claims about released checkpoints and recipes: they come in whole, go on, leave again, or are refused by name."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

import openjepa
from openjepa.convert import formats, released
from openjepa.convert.names import Told
from openjepa.convert.recipe import translate, unsaid, unused
from openjepa.engine import checkpoint
from openjepa.engine.optim import Schedule
from openjepa.errors import UserError
from openjepa.recipes import ijepa
from openjepa.recipes.exchange import export, import_weights, load
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe, from_dict, of_processes
from tests.helpers import imported, same


def test_a_released_checkpoint_comes_out_again_bit_for_bit(golden, tmp_path):
    theirs = torch.load(golden / "ijepa_tiny.pth.tar", weights_only=True)
    run = imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", told=Told(heads=3))
    export(str(run), "released", tmp_path / "out")
    ours = torch.load(tmp_path / "out" / "checkpoint.pth.tar", weights_only=True)
    assert set(theirs) | {"mean", "std"} == set(ours)
    assert all(ours[name] == theirs[name] for name in released.HEADER)
    for network in released.NETWORKS:
        assert list(ours[network]) == list(theirs[network])  # the order too: optimisers count by it
        assert same(ours[network], theirs[network])
    assert [g["params"] for g in ours["opt"]["param_groups"]] == [g["params"] for g in theirs["opt"]["param_groups"]]
    assert [g.get("WD_exclude") for g in ours["opt"]["param_groups"]] == [None, None, True, True]
    assert all(a[k] == b[k] for a, b in zip(ours["opt"]["param_groups"], theirs["opt"]["param_groups"], strict=True)
               for k in ("lr", "betas", "eps", "weight_decay"))  # fmt: skip


def test_optimiser_state_is_read_as_torch_writes_it(golden, tmp_path):
    """AdamW over the release's four groups, written by torch itself: each moment comes to its parameter."""
    saved = torch.load(golden / "ijepa_tiny.pth.tar", weights_only=True)
    named = [[(n, torch.nn.Parameter(t)) for n, t in saved[network].items()] for network in ("encoder", "predictor")]
    for network in named:
        for name, parameter in network:
            parameter.requires_grad_("pos_embed" not in name)
    decayed = [[p for n, p in network if p.ndim > 1 and "bias" not in n] for network in named]
    free = [[p for n, p in network if p.ndim <= 1 or "bias" in n] for network in named]
    groups = [{"params": ps} for ps in decayed] + [{"params": ps, "weight_decay": 0} for ps in free]
    optimizer = torch.optim.AdamW(groups)
    for step in range(3):
        for i, (_, parameter) in enumerate(p for network in named for p in network):
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, float(i + step))
        optimizer.step()
    saved["opt"] = optimizer.state_dict()
    torch.save(saved, tmp_path / "some.pth.tar")
    found = formats.read(str(tmp_path / "some.pth.tar"), Told(heads=3))
    assert found.step == 3
    networks = zip(("encoder", "predictor"), named, strict=True)
    for network, name, parameter in ((network, *entry) for network, entries in networks for entry in entries):
        if parameter.requires_grad:
            own = f"{network}.{name.removeprefix('module.').removeprefix('predictor_')}"
            assert torch.equal(found.optimizer[f"{own}/exp_avg"], optimizer.state[parameter]["exp_avg"])
            assert torch.equal(found.optimizer[f"{own}/exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


def test_training_goes_on_from_a_released_checkpoint_as_if_never_interrupted(trained, folder, tmp_path):
    """Optimiser and step travel: the end is bit-identical to that of the run it was taken from."""
    middle = checkpoint.checkpoints(trained)[3]
    assert 0 < middle.step < checkpoint.checkpoints(trained)[-1].step
    export(str(middle.path), "released", tmp_path / "out")
    recipe = openjepa.recipes.pretrain.saved_recipe(trained)
    told = Told(heads=2, image_size=(24, 40))
    run = imported(tmp_path / "out" / "checkpoint.pth.tar", tmp_path / "run", recipe, told)
    assert checkpoint.checkpoints(run)[-1].step == middle.step
    pretrain(recipe, str(folder), run, Console(quiet=True))
    assert same(checkpoint.checkpoints(run)[-1].weights(), checkpoint.checkpoints(trained)[-1].weights())
    assert same(checkpoint.checkpoints(run)[-1].optimizer(), checkpoint.checkpoints(trained)[-1].optimizer())


CONFIGS = {
    "in1k_vith14_ep300": "ijepa_vith14",
    "in1k_vith16-448_ep300": "ijepa_vith16_448",
    "in22k_vith14_ep66": "ijepa_vith14_in22k",
    "in22k_vitg16_ep44": "ijepa_vitg16_in22k",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_released_recipes_are_ours_in_released_behaviour(golden, name):
    values = yaml.safe_load((golden / "configs" / f"{name}.yaml").read_text())
    one_process = from_dict(Recipe, translate(values))
    theirs = of_processes(one_process, 2048 // one_process.data.batch_size)
    ours = ijepa.RECIPES[CONFIGS[name]]()
    assert theirs == replace(
        ours,
        precision="bf16",
        masking=replace(ours.masking, behaviour="released"),
        machine=replace(ours.machine, workers=values["data"]["num_workers"]),
    )


# Each honoured key, a value that is not our default, and where it must come out.
HONOURED = {
    "data.batch_size": (96, "data.batch_size", 96),
    "data.crop_scale": ([0.25, 0.75], "augment.crop_scale", (0.25, 0.75)),
    "data.crop_size": (256, "model.image_size", (256, 256)),
    "data.num_workers": (3, "machine.workers", 3),
    "data.use_horizontal_flip": (True, "augment.flip", 0.5),
    "mask.aspect_ratio": ([0.5, 1.25], "masking.target_aspect", (0.5, 1.25)),
    "mask.enc_mask_scale": ([0.7, 0.9], "masking.context_scale", (0.7, 0.9)),
    "mask.min_keep": (7, "masking.min_keep", 7),
    "mask.num_enc_masks": (2, "masking.contexts", 2),
    "mask.num_pred_masks": (3, "masking.targets", 3),
    "mask.patch_size": (16, "model.patch_size", 16),
    "mask.pred_mask_scale": ([0.1, 0.15], "masking.target_scale", (0.1, 0.15)),
    "meta.model_name": ("vit_small", "model.size", "S"),
    "meta.pred_depth": (5, "predictor.depth", 5),
    "meta.pred_emb_dim": (192, "predictor.width", 192),
    "meta.use_bfloat16": (False, "precision", "fp32"),
    "optimization.ema": ([0.9, 0.95], "schedule.ema", (0.9, 0.95)),
    "optimization.epochs": (77, "schedule.epochs", 77),
    "optimization.final_lr": (2e-6, "optim.final_lr", 2e-6),
    "optimization.final_weight_decay": (0.3, "optim.final_weight_decay", 0.3),
    "optimization.ipe_scale": (1.25, "schedule.horizon", 1.25),
    "optimization.lr": (3e-3, "optim.lr", 3e-3),
    "optimization.start_lr": (3e-4, "optim.start_lr", 3e-4),
    "optimization.warmup": (9, "schedule.warmup_epochs", 9),
    "optimization.weight_decay": (0.07, "optim.weight_decay", 0.07),
}


def test_every_released_key_is_honoured_refused_or_listed_as_unused(golden):
    values = yaml.safe_load((golden / "configs" / "in1k_vith14_ep300.yaml").read_text())
    keys = {f"{part}.{name}" for part, entries in values.items() for name in entries}
    refused = {"mask.allow_overlap", "meta.copy_data", "meta.read_checkpoint", "data.use_gaussian_blur",
               "data.use_color_distortion"}  # fmt: skip
    assert keys == set(HONOURED) | refused | set(unused(values))
    assert unsaid(values) == []
    for key, (value, ours, expected) in HONOURED.items():
        part, name = key.split(".")
        changed = {**values, part: {**values[part], name: value}}
        if key == "mask.patch_size":
            changed["data"] = {**values["data"], "crop_size": 224}
        if key == "data.crop_size":
            changed["mask"] = {**values["mask"], "patch_size": 16}
        recipe = from_dict(Recipe, translate(changed))
        found = recipe
        for step in ours.split("."):
            found = getattr(found, step)
        assert found == expected, key
        untouched = from_dict(Recipe, translate(values))
        for step in ours.split("."):
            untouched = getattr(untouched, step)
        assert untouched != expected, key  # or the value would prove nothing


def test_what_a_released_recipe_does_not_say_is_named(golden):
    values = yaml.safe_load((golden / "configs" / "in1k_vith14_ep300.yaml").read_text())
    del values["optimization"]["lr"], values["mask"]["min_keep"], values["data"]["pin_mem"]
    assert unsaid(values) == ["mask.min_keep", "optimization.lr"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("mask.allow_overlap", True, "mask.allow_overlap is True"),
        ("meta.copy_data", True, "meta.copy_data is True"),
        ("meta.read_checkpoint", "x.pth.tar", "openjepa import"),
        ("data.use_gaussian_blur", True, "--augment.blur"),
        ("data.use_color_distortion", True, "--augment.jitter"),
        ("meta.model_name", "vit_hug", "did you mean 'vit_huge'"),
        ("optimization.warmups", 3, "did you mean 'optimization.warmup'"),
    ],
)
def test_released_keys_that_are_not_honoured_are_refused_by_name(golden, key, value, says):
    values = yaml.safe_load((golden / "configs" / "in1k_vith14_ep300.yaml").read_text())
    part, name = key.split(".")
    values[part][name] = value
    with pytest.raises(UserError, match=says):
        translate(values)


def test_a_recipe_of_another_model_is_refused(golden, tmp_path):
    with pytest.raises(UserError, match=r"is not of this recipe \(.*model\.depth"):
        imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", ijepa.ijepa_scenes(), Told(heads=3))
    with pytest.raises(UserError, match=r"predictor\.depth: 2 -> 9"):
        imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", None, Told(heads=3), **{"predictor.depth": "9"})


def test_what_the_user_says_holds_and_what_it_changes_is_noted(golden, tmp_path):
    values = {"data.batch_size": "64", "data.mean": "0.5,0.5,0.5", "schedule.epochs": "77"}
    found = formats.read(str(golden / "ijepa_tiny.pth.tar"), Told(heads=3))
    notes = import_weights(found, "it", tmp_path / "run", None, values)
    recipe = openjepa.recipes.pretrain.saved_recipe(tmp_path / "run")
    assert (recipe.data.batch_size, recipe.data.mean, recipe.schedule.epochs) == (64, (0.5, 0.5, 0.5), 77)
    assert any("normalised by the recipe's" in note for note in notes)


def test_an_imported_run_takes_its_first_images_with_any_recipe_of_its_networks(golden, folder, tmp_path):
    run = imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", None, Told(heads=3))
    recipe = openjepa.recipes.pretrain.saved_recipe(run)
    short = replace(recipe, schedule=replace(recipe.schedule, epochs=0.5, warmup_epochs=0.1))
    pretrain(short, str(folder), run, Console(quiet=True))
    assert checkpoint.checkpoints(run)[-1].step == 3
    assert openjepa.recipes.pretrain.saved_recipe(run).schedule.epochs == 0.5
    with pytest.raises(UserError, match=r"another recipe \(schedule\.epochs"):
        pretrain(recipe, str(folder), run, Console(quiet=True))


def test_the_header_says_where_training_was(trained, tmp_path):
    """Epochs done, the last loss, and the rates of the last step."""
    middle = checkpoint.checkpoints(trained)[3]
    recipe = openjepa.recipes.pretrain.saved_recipe(trained)
    export(str(middle.path), "released", tmp_path / "out")
    saved = torch.load(tmp_path / "out" / "checkpoint.pth.tar", weights_only=True)
    per_epoch = 40 // recipe.data.batch_size
    assert saved["epoch"] == middle.step // per_epoch
    schedule = Schedule(recipe.optim, recipe.schedule, per_epoch)
    assert saved["lr"] == schedule.lr(middle.step - 1)
    assert saved["opt"]["param_groups"][0]["weight_decay"] == schedule.weight_decay(middle.step - 1)
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert saved["loss"] == next(r["loss"] for r in logged if r["step"] == middle.step and "loss" in r)


def test_values_without_weights_may_be_the_users(golden, tmp_path):
    run = imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", told=Told(heads=3), **{"model.drop_path": "0.1"})
    assert openjepa.recipes.pretrain.saved_recipe(run).model.drop_path == 0.1


def test_a_projector_that_the_layout_cannot_carry_begins_anew(tiny, folder, tmp_path):
    recipe = replace(tiny, loss=replace(tiny.loss, variance=1.0, covariance=0.04))
    pretrain(recipe, str(folder), tmp_path / "a", Console(quiet=True))
    export(str(tmp_path / "a"), "released", tmp_path / "out")
    found = formats.read(str(tmp_path / "out"), Told(heads=2))
    notes = import_weights(found, "it", tmp_path / "b", recipe)
    assert any("holds no projector" in note for note in notes)
    longer = replace(recipe, schedule=replace(recipe.schedule, epochs=3))
    pretrain(longer, str(folder), tmp_path / "b", Console(quiet=True))
    assert checkpoint.checkpoints(tmp_path / "b")[-1].step == 15
    pretrain(longer, str(folder), tmp_path / "b", Console(quiet=True))  # and is an ordinary run from then on


def test_a_run_beyond_its_schedule_says_so_and_stays_free(golden, folder, tmp_path):
    run = imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", None, Told(heads=3))
    newest = checkpoint.checkpoints(run)[-1]
    shutil.move(newest.path, newest.path.with_name("step-00000099"))
    recipe = openjepa.recipes.pretrain.saved_recipe(run)
    with pytest.raises(UserError, match=r"is at step 99, .* end at 3: raise schedule\.epochs"):
        pretrain(replace(recipe, schedule=replace(recipe.schedule, epochs=0.5, warmup_epochs=0.1)), str(folder), run)
    assert not (run / "data.json").exists()


def test_a_checkpoint_may_be_named_from_inside(trained, monkeypatch):
    newest = checkpoint.checkpoints(trained)[-1]
    monkeypatch.chdir(newest.path.parent)
    assert load(newest.path.name).vit.config.dim == 24
    monkeypatch.chdir(newest.path)
    assert load(".").vit.config.dim == 24


def test_a_checkpoint_may_lie_in_a_folder_called_checkpoints(golden, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "IN1K.pth.tar"
    shutil.copy(golden / "ijepa_tiny.pth.tar", file)
    assert load(file, heads=3).vit.config.n_blocks == 3


def test_what_shapes_cannot_say_is_asked_for(golden, trained, tmp_path):
    assert load(golden / "ijepa_tiny.pth.tar", heads=3).vit.config.n_heads == 3
    with pytest.raises(UserError, match=r"--model\.heads"):
        imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", told=Told())
    export(str(trained), "released", tmp_path / "out")
    with pytest.raises(UserError, match=r"60 patches of 4 pixels, and no square image.*--model\.image_size"):
        imported(tmp_path / "out" / "checkpoint.pth.tar", tmp_path / "run")
    with pytest.raises(UserError, match="not an image of 32x32"):
        imported(tmp_path / "out" / "checkpoint.pth.tar", tmp_path / "run", told=Told(heads=2, image_size=(32, 32)))


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def damage(kind: str, saved: dict) -> object:
    encoder = saved["target_encoder"]
    if kind == "missing tensor":
        del encoder["module.blocks.1.mlp.fc2.bias"]
    elif kind == "extra tensor":
        encoder["module.head.weight"] = torch.zeros(3)
    elif kind == "wrong shape":
        encoder["module.norm.bias"] = torch.zeros(7)
    elif kind == "learned positions":
        encoder["module.pos_embed"] = torch.randn(1, 64, 96)
    elif kind == "not finite":
        encoder["module.norm.bias"] = torch.full((96,), float("nan"))
    elif kind == "not a tensor":
        encoder["module.norm.bias"] = "hello"
    elif kind == "whole numbers":
        encoder["module.norm.bias"] = torch.zeros(96, dtype=torch.int8)
    elif kind == "optimiser":
        saved["opt"]["state"] = {0: {"step": 1}, 1: {"step": 1}}
    elif kind == "world size":
        saved["world_size"] = 0
    elif kind == "twice":
        encoder["norm.bias"] = torch.full((96,), 9.0)
    elif kind == "predictor twice":
        saved["predictor"]["module.norm.bias"] = torch.full((48,), 9.0)
    elif kind == "something else":
        saved["projector"] = {"weight": torch.zeros(2)}
    elif kind == "mean":
        saved["mean"] = [0.5, float("nan"), 0.5]
    elif kind == "no predictor":
        del saved["predictor"]
    elif kind == "another model":
        return {"conv1.weight": torch.zeros(3, 3)}
    elif kind == "not a checkpoint":
        return [1, 2]
    elif kind == "code":
        saved["extra"] = Malicious()
    return saved


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing tensor", "target_encoder does not fit this model: missing blocks.1.mlp.fc2.bias"),
        ("extra tensor", "unexpected head.weight"),
        ("twice", r"holds 'norm\.bias' twice, with 'module\.' before it and without"),
        ("predictor twice", "twice, with 'predictor_' before it"),
        ("something else", "also holds projector"),
        ("mean", "normalises by mean"),
        ("wrong shape", r"norm.bias is \[7\], expected \[96\]"),
        ("learned positions", "pos_embed are not the fixed sine-cosine positions"),
        ("not finite", "norm.bias is not finite"),
        ("no predictor", "has no 'predictor'"),
        ("another model", "it has conv1.weight"),
        ("not a checkpoint", "it has a list"),
        ("not a tensor", "holds 'module.norm.bias', which is no tensor"),
        ("whole numbers", "not floating-point"),
        ("code", "is refused: it asks for getattr"),
        ("optimiser", "'exp_avg', which is no tensor|no state for|groups of"),
        ("world size", "world_size 0"),
        ("truncated", "is it whole"),
        ("odd pickle", "is it whole|no checkpoint"),
        ("program", "TorchScript archive is a program"),
        ("empty", "is it whole"),
        ("text", "refused|whole"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_in_one_line(golden, tmp_path, monkeypatch, kind, says):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "some.pth.tar"
    good = golden / "ijepa_tiny.pth.tar"
    if kind == "truncated":
        file.write_bytes(good.read_bytes()[:100_000])
    elif kind in ("empty", "text"):
        file.write_text("" if kind == "empty" else "hello\n")
    elif kind == "odd pickle":  # asks for a tensor by a number, which torch's reader asserts about
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02K\x03Q.")
            archive.writestr("archive/version", b"3\n")
    elif kind == "program":
        torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    else:
        torch.save(damage(kind, torch.load(good, weights_only=True)), file)
    with pytest.raises(UserError, match=says) as caught:
        imported(file, tmp_path / "run", told=Told(heads=3))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "touched").exists()
    assert not list(tmp_path.glob("*.part"))

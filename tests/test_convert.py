"""Claims about weights that move: what goes in comes out the same, and what does not fit is refused by name."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import openjepa
from openjepa.convert import formats, released
from openjepa.convert.names import Told, encoder_config, mlp_ratio
from openjepa.convert.recipe import translate
from openjepa.data.augment import centre_crop
from openjepa.data.decode import decode
from openjepa.engine import checkpoint
from openjepa.errors import UserError
from openjepa.models.layers import sincos_positions
from openjepa.models.vit import SIZES, ViT, ViTConfig
from openjepa.recipes import ijepa
from openjepa.recipes.exchange import export, import_weights, load
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe, from_dict

HEADS = Told(heads=2)  # of the tiny model, whose width no known size has


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder) -> Path:
    """A finished tiny run on images that are not square, every checkpoint kept."""
    from tests.conftest import TINY

    model = TINY["model"] | {"image_size": [24, 40]}
    recipe = from_dict(
        Recipe, TINY | {"model": model, "machine": {"keep": 99, "checkpoint_every": 0.2}, "masking": {"min_keep": 4}}
    )
    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(recipe, str(folder), out, Console(quiet=True))
    return out


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def imported(source: object, out: Path, base: Recipe | None = None, told: Told = HEADS, **values: str) -> Path:
    import_weights(formats.read(str(source), told), str(source), out, base, values)
    return out


# ---------------------------------------------------------------- the released layout


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


def test_known_sizes_are_told_by_their_shapes():
    for size, (width, depth, heads, ratio) in SIZES.items():
        with torch.device("meta"):
            config = ViTConfig(size=size, image_size=(224, 224), patch_size=16)
            state = ViT(config).state_dict() | {"pos_embed": torch.empty(1, 196, width)}
        found = encoder_config(state, Told(), "it")
        assert found == config
        assert (found.n_blocks, found.n_heads, found.mlp_ratio) == (depth, heads, ratio)


@pytest.mark.parametrize("size", ["B", "L"])
def test_parameters_and_shapes_of_the_released_encoders(golden, size):
    name = {"B": "vit_base_224_16", "L": "vit_large_224_16"}[size]
    theirs = json.loads((golden / "models.json").read_text())[name]
    with torch.device("meta"):
        vit = ViT(ViTConfig(size=size))
    assert sum(p.numel() for p in vit.parameters()) == theirs["encoder_params"]
    own = {k: list(v.shape) for k, v in vit.state_dict().items()}
    listed = {k: v for k, v in theirs["shapes"].items() if k != "pos_embed"}  # of one block
    assert {k: own[k] for k in listed} == listed
    assert list(vit.get_buffer("positions")[None].shape) == theirs["shapes"]["pos_embed"]


@pytest.mark.parametrize(
    ("recipe", "width", "depth", "heads", "hidden", "grid", "predictor"),
    [
        ("ijepa_vitb16", 768, 12, 12, 3072, 14, 6),
        ("ijepa_vitl16", 1024, 24, 16, 4096, 14, 12),
        ("ijepa_vith14", 1280, 32, 16, 5120, 16, 12),
        ("ijepa_vith16_448", 1280, 32, 16, 5120, 28, 12),
        ("ijepa_vitg16_in22k", 1408, 40, 16, 6144, 14, 16),
    ],
)
def test_the_papers_sizes(recipe, width, depth, heads, hidden, grid, predictor):
    """Protocols, E.1 and E.2: built without memory on the meta device."""
    made = ijepa.RECIPES[recipe]()
    with torch.device("meta"):
        method = openjepa.IJEPA(made.model, made.predictor, made.loss)
    assert len(method.encoder.blocks) == depth
    assert method.encoder.blocks[0].attn.heads == heads == method.predictor.blocks[0].attn.heads
    assert method.encoder.blocks[-1].mlp.fc1.weight.shape == (hidden, width)
    assert method.encoder.get_buffer("positions").shape == (grid * grid, width)
    assert len(method.predictor.blocks) == predictor
    assert method.predictor.embed.weight.shape == (384, width)


# ---------------------------------------------------------------- released recipes


CONFIGS = {
    "in1k_vith14_ep300": "ijepa_vith14",
    "in1k_vith16-448_ep300": "ijepa_vith16_448",
    "in22k_vith14_ep66": "ijepa_vith14_in22k",
    "in22k_vitg16_ep44": "ijepa_vitg16_in22k",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_released_recipes_are_ours_in_released_behaviour(golden, name):
    values = yaml.safe_load((golden / "configs" / f"{name}.yaml").read_text())
    per_process = values["data"]["batch_size"]
    theirs = from_dict(Recipe, translate(values, processes=2048 // per_process))
    ours = ijepa.RECIPES[CONFIGS[name]]()
    assert theirs == replace(
        ours,
        precision="bf16",
        masking=replace(ours.masking, behaviour="released"),
        machine=replace(ours.machine, workers=values["data"]["num_workers"]),
    )


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


# ---------------------------------------------------------------- Hugging Face, timm, ONNX, safetensors


SIZES_TRIED = [None, (32, 32), (40, 16)]  # the run's own 24x40, square, and another that is not: interpolated


@pytest.mark.parametrize("size", SIZES_TRIED)
def test_hugging_face_computes_the_same(trained, tmp_path, size):
    from transformers import AutoModel

    export(str(trained), "hf", tmp_path / "hf", image_size=size)
    model, encoder = AutoModel.from_pretrained(tmp_path / "hf"), load(trained)
    assert type(model).__name__ == "IJepaModel"
    x = images(3, *(size or (24, 40)))
    with torch.no_grad():
        theirs = model(encoder.normalise(x)).last_hidden_state
    assert (theirs - encoder(x)).abs().max() < 1e-5


def test_hugging_face_interpolates_as_we_do(trained, tmp_path):
    from transformers import AutoModel

    export(str(trained), "hf", tmp_path / "hf", image_size=(32, 32))
    model, encoder = AutoModel.from_pretrained(tmp_path / "hf"), load(trained).resized((32, 32))
    x = images(2, 48, 48)
    with torch.no_grad():
        theirs = model(encoder.normalise(x), interpolate_pos_encoding=True).last_hidden_state
    assert (theirs - encoder(x)).abs().max() < 1e-5


def test_the_image_processor_does_our_preprocessing(trained, tmp_path):
    from transformers import AutoImageProcessor

    export(str(trained), "hf", tmp_path / "hf", image_size=(32, 32))
    processor, encoder = AutoImageProcessor.from_pretrained(tmp_path / "hf"), load(trained)
    rng = np.random.default_rng(0)
    for width, height in ((60, 60), (80, 50), (45, 90)):
        picture = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(
            (width, height), Image.BICUBIC
        )
        ours = decode(np.asarray(picture), lambda w, h: centre_crop(w, h, (32, 32)), (32, 32), 3)
        expected = encoder.normalise(torch.from_numpy(np.array(ours)).permute(2, 0, 1)[None])
        found = processor(picture, return_tensors="pt")["pixel_values"]
        grey_level = 1 / 255 / 0.224
        if width == height:  # elsewhere the library rounds the longer side to whole pixels before it crops
            assert (found - expected).abs().max() < 1.01 * grey_level
        else:
            assert (found - expected).abs().mean() < 3 * grey_level


@pytest.mark.parametrize("size", SIZES_TRIED)
def test_timm_computes_the_same(trained, tmp_path, size):
    import timm

    line = export(str(trained), "timm", tmp_path / "timm", image_size=size)
    encoder = load(trained)
    x = images(3, *(size or (24, 40)))
    for model in (eval(line), timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)):
        model.eval()
        with torch.no_grad():
            patches, pooled = model.forward_features(encoder.normalise(x)), model(encoder.normalise(x))
        assert (patches - encoder(x)).abs().max() < 1e-5
        assert (pooled - encoder.features(x, layers=1)).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES_TRIED)
def test_onnx_computes_the_same_for_any_batch(trained, tmp_path, size):
    import onnxruntime

    export(str(trained), "onnx", tmp_path / "onnx", image_size=size)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "encoder.onnx", providers=["CPUExecutionProvider"])
    encoder = load(trained)
    for batch in (1, 5):
        x = images(batch, *(size or (24, 40)))
        patches, mean = session.run(["patches", "mean"], {"images": x.numpy()})
        assert np.abs(patches - encoder(x).numpy()).max() < 1e-4
        assert np.abs(mean - encoder.features(x, layers=1).numpy()).max() < 1e-4


@pytest.mark.parametrize("network", ["target_encoder", "encoder"])
def test_safetensors_is_the_encoder_itself(trained, tmp_path, network):
    export(str(trained), "safetensors", tmp_path / "out", network=network)
    found, encoder = load(tmp_path / "out" / f"{network}.safetensors"), load(trained, network)
    assert same(found.vit.state_dict(), encoder.vit.state_dict())
    assert found.vit.config == encoder.vit.config
    assert found.network == network
    x = images(2, 32, 48)
    assert torch.equal(found(x), encoder(x))


def test_safetensors_carries_what_other_formats_cannot(tiny, folder, tmp_path):
    recipe = replace(tiny, model=replace(tiny.model, class_token=True, registers=2, layer_scale=0.1, qk_norm=True))
    pretrain(
        replace(recipe, schedule=replace(tiny.schedule, epochs=1)), str(folder), tmp_path / "r", Console(quiet=True)
    )
    export(str(tmp_path / "r"), "safetensors", tmp_path / "out")
    x = images(2, 32, 32)
    assert torch.equal(load(tmp_path / "out" / "target_encoder.safetensors")(x), load(tmp_path / "r")(x))
    for form in ("hf", "timm", "released"):
        with pytest.raises(UserError, match=r"cannot carry model\.class_token, model\.registers, model\.layer_scale"):
            export(str(tmp_path / "r"), form, tmp_path / form)
        assert not (tmp_path / form).exists()


@pytest.mark.parametrize("form", ["hf", "timm", "safetensors"])
def test_what_left_comes_back_bit_for_bit(golden, tmp_path, form):
    """A released checkpoint in, another format out, and in again."""
    run = imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", told=Told(heads=3))
    export(str(run), form, tmp_path / "out")
    source = tmp_path / "out" / "target_encoder.safetensors" if form == "safetensors" else tmp_path / "out"
    back, encoder = imported(source, tmp_path / "back", told=Told(heads=3)), load(run)
    assert load(tmp_path / "out").statistics() == encoder.statistics()  # a folder does as well as its file
    assert same(load(back).vit.state_dict(), encoder.vit.state_dict())
    assert load(back).statistics() == encoder.statistics()
    assert same(load(back, "encoder").vit.state_dict(), encoder.vit.state_dict())  # where training would begin
    assert same(load(source).vit.state_dict(), encoder.vit.state_dict())  # without a run, too


def test_a_released_checkpoint_leaves_as_a_graph(golden, tmp_path):
    import onnxruntime

    run = imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", told=Told(heads=3))
    export(str(run), "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "encoder.onnx", providers=["CPUExecutionProvider"])
    x = images(2, 64, 64)
    patches, _ = session.run(None, {"images": x.numpy()})
    assert np.abs(patches - load(golden / "ijepa_tiny.pth.tar", heads=3)(x).numpy()).max() < 1e-4


def test_the_predictor_leaves_as_plain_tensors(trained, tmp_path):
    export(str(trained), "safetensors", tmp_path / "out", network="predictor")
    weights = checkpoint.checkpoints(trained)[-1].weights()
    assert same(
        load_file(tmp_path / "out" / "predictor.safetensors"),
        {k.removeprefix("predictor."): v for k, v in weights.items() if k.startswith("predictor.")},
    )
    with pytest.raises(UserError, match="carries encoders"):
        export(str(trained), "onnx", tmp_path / "other", network="predictor")


# ---------------------------------------------------------------- inference


def test_features_and_maps_on_any_size(trained):
    encoder = load(trained)
    x = images(3, 16, 48)
    assert encoder(x).shape == (3, 4 * 12, 24)
    assert encoder.features(x, layers=2).shape == (3, 2 * 24)
    assert encoder.features(x).shape == (3, 2 * 24)  # four asked for, two there
    assert torch.equal(encoder.features(x, layers=1), encoder(x).mean(1))
    assert torch.equal(encoder.features(x, layers=1, pool="none"), encoder(x))
    first, last = encoder.intermediate(x, layers=[0, -1])
    assert first.shape == last.shape == (3, 24, 4, 12)
    assert torch.equal(last.flatten(2).transpose(1, 2), encoder(x))
    assert not torch.equal(first, last)
    with pytest.raises(ValueError, match="layers"):
        encoder.intermediate(x, layers=[2])
    with pytest.raises(ValueError, match="do not divide"):
        encoder(images(1, 18, 40))
    for wrong in ({"layers": 0}, {"pool": "max"}):
        with pytest.raises(ValueError, match="at least one layer"):
            encoder.features(x, **wrong)
    with pytest.raises(ValueError, match="give uint8"):
        encoder(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[batch, channels, height, width\]"):
        encoder(images(1, 16, 16)[0])


# ---------------------------------------------------------------- bad input


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
    else:
        torch.save(damage(kind, torch.load(good, weights_only=True)), file)
    with pytest.raises(UserError, match=says) as caught:
        imported(file, tmp_path / "run", told=Told(heads=3))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "touched").exists()
    assert not list(tmp_path.glob("*.part"))


def test_what_shapes_cannot_say_is_asked_for(golden, trained, tmp_path):
    assert load(golden / "ijepa_tiny.pth.tar", heads=3).vit.config.n_heads == 3
    with pytest.raises(UserError, match=r"--model\.heads"):
        imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", told=Told())
    export(str(trained), "released", tmp_path / "out")
    with pytest.raises(UserError, match=r"60 patches of 4 pixels, and no square image.*--model\.image_size"):
        imported(tmp_path / "out" / "checkpoint.pth.tar", tmp_path / "run")
    with pytest.raises(UserError, match="not an image of 32x32"):
        imported(tmp_path / "out" / "checkpoint.pth.tar", tmp_path / "run", told=Told(heads=2, image_size=(32, 32)))


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


def test_normalisation_travels_in_every_layout(folder, tiny, tmp_path):
    data = replace(tiny.data, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    short = replace(tiny, data=data, schedule=replace(tiny.schedule, epochs=0.4, warmup_epochs=0.1))
    pretrain(short, str(folder), tmp_path / "r", Console(quiet=True))
    x = images(2, 32, 32)
    for form in ("released", "hf", "timm", "safetensors"):
        export(str(tmp_path / "r"), form, tmp_path / form)
        assert torch.equal(load(tmp_path / form, heads=2)(x), load(tmp_path / "r")(x)), form


def test_folders_that_hold_something_are_left_alone(trained, tmp_path, monkeypatch):
    for name in ("full", "new.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(str(trained), "safetensors", tmp_path / "full")
    export(str(trained), "safetensors", tmp_path / "new")
    for name in ("full", "new.part"):
        assert [f.name for f in (tmp_path / name).iterdir()] == ["precious"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(str(trained), "timm", Path("."))
    assert (tmp_path / "here" / "config.json").exists()
    assert (tmp_path / "here" / "model.safetensors").stat().st_mode & 0o044  # others may read it
    assert load(tmp_path / "here").vit.config.dim == 24


def test_a_failed_export_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(folder, encoder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(formats.WRITERS, "timm", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(str(trained), "timm", tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.iterdir())


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("form", "change", "says"),
    [
        ("hf", lambda d: change_json(d / "config.json", layer_norm_eps=1e-3), "layer_norm_eps 0.001"),
        ("hf", lambda d: change_json(d / "config.json", hidden_act="relu"), "hidden_act 'relu'"),
        ("hf", lambda d: change_json(d / "config.json", model_type="vit"), "type 'vit', not 'ijepa'"),
        ("hf", lambda d: change_json(d / "config.json", image_size="a"), "not what it looks like"),
        ("hf", lambda d: change_json(d / "config.json", num_attention_heads=0), "heads"),
        ("hf", lambda d: (d / "config.json").write_text("{"), "cannot be read as JSON"),
        ("hf", lambda d: (d / "preprocessor_config.json").write_text("{"), "cannot be read as JSON"),
        ("hf", lambda d: change_json(d / "preprocessor_config.json", image_mean=[1]), "normalises by mean"),
        ("timm", lambda d: change_json(d / "config.json", pretrained_cfg=None), "not what it looks like"),
        ("timm", lambda d: change_json(d / "config.json", model_args={"img_size": [64]}), "not what it looks like"),
        ("timm", lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
        ("safetensors", lambda d: (d / "x.safetensors").write_text("x"), "neither a run nor"),
    ],
)  # fmt: skip
def test_odd_folders_are_refused_in_one_line(trained, tmp_path, form, change, says):
    export(str(trained), form, tmp_path / "out")
    change(tmp_path / "out")
    with pytest.raises(UserError, match=says) as caught:
        load(tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("form", ["hf", "timm", "safetensors"])
@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "half precision"])
def test_every_reader_is_strict(trained, tmp_path, form, kind):
    export(str(trained), form, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    state, header = formats.read_safetensors(file)
    name = next(n for n in state if n.endswith(("fc2.bias", "output.dense.bias")))
    if kind == "missing":
        del state[name]
    elif kind == "extra":
        state["head.weight"] = torch.zeros(3)
    elif kind == "shape":
        state[name] = torch.zeros(7)
    else:
        state = {k: v.bfloat16() for k, v in state.items()}
    save_file(state, file, dict(header))
    if kind == "half precision":
        x = images(1, 24, 40)
        assert (load(tmp_path / "out", heads=2)(x) - load(trained)(x)).abs().max() < 0.1
        return
    with pytest.raises(UserError, match="bias" if kind != "extra" else "head.weight"):
        load(tmp_path / "out", heads=2)


def test_a_checkpoint_may_lie_in_a_folder_called_checkpoints(golden, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "IN1K.pth.tar"
    shutil.copy(golden / "ijepa_tiny.pth.tar", file)
    assert load(file, heads=3).vit.config.n_blocks == 3


def test_graphs_and_predictors_are_not_taken_for_encoders(trained, tmp_path):
    (tmp_path / "encoder.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="cannot be read back"):
        load(tmp_path / "encoder.onnx")
    export(str(trained), "safetensors", tmp_path / "out", network="predictor")
    with pytest.raises(UserError, match="is a predictor"):
        load(tmp_path / "out")
    with pytest.raises(UserError, match="is a run: export it"):
        formats.read(str(trained), Told())


def test_interpolated_exports_say_why_they_do_not_come_back(trained, tmp_path):
    export(str(trained), "timm", tmp_path / "out", image_size=(32, 32))
    with pytest.raises(UserError, match="interpolated to another image size"):
        load(tmp_path / "out")


@pytest.mark.parametrize(("hidden", "width"), [(704, 960), (3904, 896), (79, 24)])
def test_any_hidden_width_has_a_ratio(hidden, width):
    assert int(width * mlp_ratio(width, hidden)) == hidden


def test_an_extra_that_is_missing_is_named(trained, tmp_path, monkeypatch):
    for module, form in (("transformers", "hf"), ("onnx", "onnx")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"pip install 'openjepa\[{form}\]'"):
            export(str(trained), form, tmp_path / form)
        assert not (tmp_path / form).exists()


def test_a_damaged_exported_file_is_named(trained, tmp_path):
    export(str(trained), "safetensors", tmp_path / "out")
    file = tmp_path / "out" / "target_encoder.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="is it whole"):
        load(file)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "nothing")
    save_file({"pos_embed": sincos_positions((2, 2), 8)[None]}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="has no 'patch_embed"):
        load(tmp_path / "odd.safetensors")
    shutil.copy(__file__, tmp_path / "some.py")
    with pytest.raises(UserError):
        load(tmp_path)

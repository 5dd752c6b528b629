"""Claims about weights that leave: other libraries compute the same, what comes back is the same, what does not fit is refused."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from openjepa.convert import formats
from openjepa.convert.names import Told
from openjepa.data.augment import centre_crop
from openjepa.data.decode import decode
from openjepa.engine import checkpoint
from openjepa.errors import UserError
from openjepa.models.layers import sincos_positions
from openjepa.recipes.exchange import export, load
from openjepa.recipes.pretrain import pretrain
from tests.helpers import images, imported, same

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


def test_processors_take_grey_pictures(trained, tmp_path):
    from transformers import AutoImageProcessor

    for size in ((32, 32), None):
        export(str(trained), "hf", tmp_path / str(size), image_size=size)
        processor = AutoImageProcessor.from_pretrained(tmp_path / str(size))
        for mode in ("L", "RGBA", "P"):
            found = processor(Image.new(mode, (50, 60)), return_tensors="pt")["pixel_values"]
            assert found.shape == (1, 3, *(size or (24, 40)))


@pytest.mark.parametrize("form", ["hf", "timm"])
def test_exports_remember_which_network_they_are(trained, tmp_path, form):
    export(str(trained), form, tmp_path / "out", network="encoder")
    found = load(tmp_path / "out")
    assert found.network == "encoder"
    assert same(found.vit.state_dict(), load(trained, "encoder").vit.state_dict())
    assert found.statistics() == load(trained).statistics()  # to the last digit


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
        with pytest.raises(
            UserError, match=r"cannot carry (model\.class_token, )?model\.registers, model\.layer_scale"
        ):
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


def test_from_format_to_format_not_a_bit_is_lost(golden, tmp_path):
    """A released checkpoint through every layout in turn, each written from the one before."""
    first, source = (
        load(golden / "ijepa_tiny.pth.tar", heads=3),
        imported(golden / "ijepa_tiny.pth.tar", tmp_path / "run", told=Told(heads=3)),
    )
    for form in ("released", "safetensors", "timm", "hf"):
        if form == "safetensors":  # the released layout says no heads
            source = imported(source, tmp_path / "again", told=Told(heads=3))
        export(str(source), form, tmp_path / form)
        source = tmp_path / form
    assert same(load(source).vit.state_dict(), first.vit.state_dict())
    assert load(source).vit.config.n_heads == 3


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
    assert sorted(f.name for f in Path(".").iterdir()) == ["config.json", "model.safetensors"]  # seen from inside, too
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
        ("hf", lambda d: change_json(d / "config.json", model_type="vit"), "type 'vit', not 'ijepa' or 'vit_mae'"),
        ("hf", lambda d: change_json(d / "config.json", image_size="a"), "not what it looks like"),
        ("hf", lambda d: change_json(d / "config.json", num_attention_heads=0), "heads"),
        ("hf", lambda d: change_json(d / "config.json", num_hidden_layers=3), "says num_hidden_layers 3, and its weights have 2"),
        ("hf", lambda d: change_json(d / "config.json", hidden_size=999), "says hidden_size 999"),
        ("hf", lambda d: change_json(d / "preprocessor_config.json", do_rescale=False), "do_rescale False"),
        ("hf", lambda d: change_json(d / "preprocessor_config.json", rescale_factor=1 / 127.5), "rescale_factor"),
        ("hf", lambda d: (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors"), "has 1 of the 2 files"),
        ("timm", lambda d: change_json(d / "config.json", architecture="resnet50"), "is a resnet50"),
        ("timm", lambda d: change_json(d / "config.json", model_args={"act_layer": "relu"}), "act_layer 'relu'"),
        ("timm", lambda d: change_json(d / "config.json", model_args={"depth": 3, "num_heads": 2, "img_size": [24, 40]}),
         "says depth 3, and its weights have 2"),
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

"""Claims about MAE's weights: other code computes the same with them, they come back bit for bit, or are refused by name."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from openjepa.convert import formats
from openjepa.convert.names import Imported, Told, as_stored
from openjepa.engine import checkpoint
from openjepa.errors import UserError
from openjepa.masking import Masks
from openjepa.methods.mae import MAE, MAEConfig
from openjepa.models.layers import sincos_positions
from openjepa.models.vit import ViTConfig
from openjepa.recipes.exchange import export, import_weights, load
from openjepa.recipes.pretrain import build, pretrain, saved_recipe
from openjepa.recipes.recipe import to_yaml
from tests.helpers import command, images, imported, refused, same

MODEL = ViTConfig(size="Ti", image_size=(32, 32), patch_size=8, width=48, depth=2, heads=3, class_token=True)
CONFIG = MAEConfig(decoder_width=32, decoder_depth=2, decoder_heads=4)
TOLD = Told(heads=3, decoder_heads=4)


def weights(model: ViTConfig = MODEL, config: MAEConfig = CONFIG) -> dict[str, dict[str, Tensor]]:
    """Of both networks, nothing at 0 or 1."""
    torch.manual_seed(0)
    state = {k: v + 0.05 * torch.randn_like(v) for k, v in MAE(model, config).state_dict().items()}
    return {
        n: {k.removeprefix(f"{n}."): v for k, v in state.items() if k.startswith(n)} for n in ("encoder", "decoder")
    }


def make(out: Path, model: ViTConfig = MODEL, config: MAEConfig = CONFIG) -> Path:
    import_weights(Imported(model, weights(model, config), mae=config, mean=(0.1, 0.2, 0.3)), "numbers", out)
    return out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make(tmp_path / "mae")


def method_of(run: Path) -> MAE:
    method = build(saved_recipe(run))
    assert isinstance(method, MAE)
    method.load_state_dict(checkpoint.checkpoints(run)[-1].weights())
    return method.eval()


def bare(state: dict[str, Tensor], file: Path, **more: object) -> Path:
    torch.save({"model": state, **more}, file)
    return file


@pytest.fixture
def published(golden: Path, tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    """The release's own weights, as its code saves them: no more than `model`."""
    tensors = load_file(golden / "mae_tiny.safetensors")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return state, bare(state, tmp_path / "published.pth")


def test_a_published_checkpoint_comes_out_again_bit_for_bit(golden, published, tmp_path):
    state, file = published
    run = imported(file, tmp_path / "run", told=TOLD)
    recipe = saved_recipe(run)
    assert (recipe.method, recipe.mae, recipe.masking.strategy) == ("mae", CONFIG, "random")
    tensors, about = load_file(golden / "mae_tiny.safetensors"), json.loads((golden / "mae_tiny.json").read_text())
    order = tensors["noise"].argsort(1)
    loss = method_of(run)(tensors["images"], Masks(order[:, None, :4], order[:, None, 4:]))["loss"].item()
    assert loss == pytest.approx(about["loss_norm_pix"], rel=1e-6)
    export(str(run), "released", tmp_path / "out")
    assert same(torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"], state)
    back = imported(tmp_path / "out", tmp_path / "back", told=Told())  # ours says what shapes cannot
    assert same(checkpoint.checkpoints(back)[-1].weights(), checkpoint.checkpoints(run)[-1].weights())
    assert saved_recipe(back) == recipe


def test_a_published_encoder_alone_makes_a_run_and_an_encoder(published, folder, tmp_path):
    state, file = published
    alone = bare({k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}, tmp_path / "encoder.pth")
    encoder = load(alone, heads=3)
    x = images(2, 32, 32)
    assert torch.equal(encoder(x), load(file, heads=3)(x))
    assert encoder(x).shape == (2, 16, 48)  # the class token is no patch
    assert torch.equal(encoder.vit.prefix_tokens, state["cls_token"][0])
    notes = import_weights(
        formats.read(str(alone), TOLD), "it", tmp_path / "run", None,
        {"mae.decoder_width": "32", "mae.decoder_depth": "1", "mae.decoder_heads": "2"},
    )  # fmt: skip
    assert notes == ["it holds an encoder alone (encoder): the encoder starts from it, the decoder at random"]
    assert torch.equal(load(tmp_path / "run")(x), encoder(x))
    recipe = saved_recipe(tmp_path / "run")
    data = replace(recipe.data, batch_size=8)
    short = replace(recipe, data=data, schedule=replace(recipe.schedule, epochs=0.4, warmup_epochs=0.1))
    pretrain(short, str(folder), tmp_path / "run", Console(quiet=True))
    assert checkpoint.checkpoints(tmp_path / "run")[-1].step == 2


def test_what_the_training_code_saves_beside_the_weights_is_read_or_left(published, tmp_path):
    state, _ = published
    args = argparse.Namespace(norm_pix_loss=False, mask_ratio=0.75, model="mae_vit_base_patch16")
    file = bare(state, tmp_path / "x.pth", args=args, epoch=3, scaler={}, optimizer={"state": {}, "param_groups": []})
    found = formats.read(str(file), TOLD)
    assert found.mae == replace(CONFIG, normalised=False)
    notes = import_weights(found, "it", tmp_path / "run")
    assert notes == ["no optimiser's state came in: training would begin at step 0 from these weights"]


def test_decoders_of_the_published_width_have_the_published_heads(tmp_path):
    import openjepa.convert.mae as layout

    config = MAEConfig(decoder_depth=1)
    state = layout.stored(Imported(MODEL, weights(MODEL, config), mae=config))
    assert formats.read(str(bare(state, tmp_path / "x.pth")), Told(heads=3)).mae == config


def masked(noise: Tensor, keep: int) -> Masks:
    order = noise.argsort(1)
    return Masks(order[:, None, :keep], order[:, None, keep:])


def agree(theirs, run: Path) -> None:
    """Loss, painted patches, and the features of all patches."""
    from openjepa.convert.mae import pixels

    method, encoder = method_of(run), load(run)
    x = encoder.normalise(images(3, 32, 32))
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    masks = masked(noise, 4)
    with torch.no_grad():
        found, ours = theirs(x, noise=noise), method(x, masks)["loss"]
        painted = method.painted(x, masks)
        logits = found.logits.gather(1, masks.targets[:, 0, :, None].expand(-1, -1, 192))
        everything = theirs.vit.config.mask_ratio
        theirs.vit.config.mask_ratio = 0.0
        features = theirs.vit(x, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
        theirs.vit.config.mask_ratio = everything
    assert (pixels(logits.movedim(-1, 0), (-1, 3)).movedim(0, -1) - painted).abs().max() < 1e-5
    assert abs(found.loss - ours) < 1e-5
    assert (features - encoder.vit.tokens(x)).abs().max() < 1e-5
    assert (features[:, 1:] - encoder(images(3, 32, 32))).abs().max() < 1e-5


@pytest.mark.parametrize("normalised", [True, False])
def test_hugging_face_paints_the_same(tmp_path, normalised):
    from transformers import AutoImageProcessor, AutoModel, ViTMAEForPreTraining

    run = make(tmp_path / "run", config=replace(CONFIG, normalised=normalised))
    line = export(str(run), "hf", tmp_path / "hf")
    assert "AutoModelForPreTraining" in line
    agree(ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").eval(), run)
    assert same(AutoModel.from_pretrained(tmp_path / "hf").state_dict(),
                ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").vit.state_dict())  # fmt: skip
    assert tuple(AutoImageProcessor.from_pretrained(tmp_path / "hf").image_mean) == (0.1, 0.2, 0.3)
    back = imported(tmp_path / "hf", tmp_path / "back", told=Told())
    assert same(checkpoint.checkpoints(back)[-1].weights(), checkpoint.checkpoints(run)[-1].weights())
    assert (saved_recipe(back).mae, saved_recipe(back).data.mean) == (saved_recipe(run).mae, (0.1, 0.2, 0.3))


@pytest.fixture
def theirs(tmp_path: Path):
    """Of the library's own making, at random weights, in a folder."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    about = ViTMAEConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=128,
        norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = ViTMAEForPreTraining(about).eval()
    for stored, width in ((model.vit.embeddings.position_embeddings, 48), (model.decoder.decoder_pos_embed, 32)):
        stored.data = as_stored(sincos_positions((4, 4), width), class_token=True)  # version 5 leaves them at 0
    model.save_pretrained(tmp_path / "theirs")
    return model


def test_hugging_faces_own_come_in_and_leave_bit_for_bit(theirs, tmp_path):
    run = imported(tmp_path / "theirs", tmp_path / "run", told=Told())
    agree(theirs, run)
    export(str(run), "hf", tmp_path / "out")
    found = type(theirs).from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, found[k]) for k, v in theirs.state_dict().items() if "pos" not in k)
    assert all((v - found[k]).abs().max() < 1e-6 for k, v in theirs.state_dict().items() if "pos" in k)


def test_the_librarys_own_epsilon_is_taken_for_that_of_training(theirs, tmp_path):
    """Its files of the published weights say 1e-12; they were trained with 1e-6."""
    expected = load(tmp_path / "theirs")(images(2, 32, 32))
    change(tmp_path / "theirs", layer_norm_eps=1e-12)
    assert torch.equal(load(tmp_path / "theirs")(images(2, 32, 32)), expected)


def test_all_names_that_versions_of_the_library_use_are_read(theirs, tmp_path):
    """Those in memory now, those that version 5 saves, and those of the published files, which are what is written here."""
    from transformers import ViTMAEForPreTraining

    run = imported(tmp_path / "theirs", tmp_path / "run", told=Told())
    export(str(run), "hf", tmp_path / "out")
    published, saved = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "theirs" / "model.safetensors"),
    )
    for name in ("vit.encoder.layer.1.attention.attention.query.bias", "vit.encoder.layer.1.output.dense.weight",
                 "decoder.decoder_layers.1.attention.attention.value.weight", "decoder.decoder_pred.bias"):  # fmt: skip
        assert name in published
    assert any(k.startswith("decoder.decoder_encoder.layer") for k in saved)  # as of 5.24, and else drop that name here
    now = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    assert "decoder.decoder_layers.1.attention.q_proj.weight" in now
    for number, state in enumerate((published, saved, now)):
        save_file(state, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
        back = imported(tmp_path / "theirs", tmp_path / str(number), told=Told())
        assert same(checkpoint.checkpoints(back)[-1].weights(), checkpoint.checkpoints(run)[-1].weights())
        known = ViTMAEForPreTraining.from_pretrained(tmp_path / "theirs").state_dict()
        assert all(torch.allclose(v, known[k], atol=1e-6) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("form", ["hf", "released", "timm", "safetensors"])
def test_what_left_comes_back_with_the_same_features(run, tmp_path, form):
    export(str(run), form, tmp_path / "out")
    back = imported(tmp_path / "out", tmp_path / "back", told=Told(heads=3))
    x = images(2, 32, 32)
    assert saved_recipe(back).method == "mae"
    assert torch.equal(load(back)(x), load(run)(x))
    assert torch.equal(load(tmp_path / "out", heads=3)(x), load(run)(x))
    assert load(tmp_path / "out", heads=3).network == "encoder"


@pytest.mark.parametrize("form", ["hf", "released"])
def test_the_share_that_is_hidden_goes_along(run, tmp_path, form):
    less = tmp_path / "less"
    shutil.copytree(run, less)
    recipe = saved_recipe(run)
    (less / "recipe.yaml").write_text(to_yaml(replace(recipe, masking=replace(recipe.masking, hidden=0.5))))
    export(str(less), form, tmp_path / "out")
    back = imported(tmp_path / "out", tmp_path / "back", told=Told(heads=3))
    assert saved_recipe(back).masking.hidden == 0.5
    if form == "hf":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["mask_ratio"] == 0.5


def test_an_encoder_without_decoder_leaves_as_vit_mae_model(run, tmp_path):
    from transformers import AutoModel

    export(str(run), "timm", tmp_path / "timm")
    assert "AutoModel." in export(str(tmp_path / "timm"), "hf", tmp_path / "hf")
    model = AutoModel.from_pretrained(tmp_path / "hf", mask_ratio=0.0).eval()
    assert type(model).__name__ == "ViTMAEModel"
    x = load(run).normalise(images(2, 32, 32))
    with torch.no_grad():
        found = model(x, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    assert (found - load(run).vit.tokens(x)).abs().max() < 1e-5
    assert same(load(tmp_path / "hf").vit.state_dict(), load(run).vit.state_dict())


def ibot(run: Path, out: Path) -> Path:
    """A run of iBOT that starts from the encoder of another."""
    found = Imported(MODEL, {"encoder": weights()["encoder"]})
    values = {"method": "ibot", "ibot.prototypes": "16", "ibot.hidden": "16", "ibot.bottleneck": "8",
              "crops.small_size": "16,16"}  # fmt: skip
    notes = import_weights(found, str(run), out, None, values)
    assert notes == [
        "it holds an encoder alone (encoder): both encoders start from it, the head and the mask_token at random"
    ] or (
        notes
        == ["it holds an encoder alone (encoder): both encoders start from it, the mask_token and the head at random"]
    )
    return out


@pytest.mark.parametrize("kind", ["mae", "ibot"])
@pytest.mark.parametrize("size", [None, (48, 24)])
def test_class_tokens_leave_where_other_libraries_compute_the_same(run, tmp_path, kind, size):
    import onnxruntime
    import timm

    source = run if kind == "mae" else ibot(run, tmp_path / "ibot")
    encoder, x = load(source), images(2, *(size or (32, 32)))
    model = eval(export(str(source), "timm", tmp_path / "timm", image_size=size), {"timm": timm}).eval()
    with torch.no_grad():
        tokens, pooled = model.forward_features(encoder.normalise(x)), model(encoder.normalise(x))
    assert (tokens - encoder.vit.tokens(encoder.normalise(x))).abs().max() < 1e-5
    assert (pooled - encoder.features(x, layers=1)).abs().max() < 1e-5
    export(str(source), "onnx", tmp_path / "onnx", image_size=size)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "encoder.onnx", providers=["CPUExecutionProvider"])
    patches, mean = session.run(["patches", "mean"], {"images": x.numpy()})
    assert np.abs(patches - encoder(x).numpy()).max() < 1e-4
    assert np.abs(mean - encoder.features(x, layers=1).numpy()).max() < 1e-4
    if not size:
        assert load(tmp_path / "timm").network == ("encoder" if kind == "mae" else "target_encoder")
        assert torch.equal(load(tmp_path / "timm")(x), encoder(x))


def test_timms_own_mae_is_read(run, tmp_path):
    """As the hub has it: an architecture with a class token, and no arguments."""
    from openjepa.convert import timm

    export(str(run), "timm", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    found = timm.read(state, Told(heads=3), "it", {"architecture": "vit_tiny_patch8_32.mae"})
    assert same(found.weights["encoder"], load(run).vit.state_dict())


@pytest.mark.parametrize(
    ("form", "options", "says"),
    [
        ("safetensors", {"network": "predictor"}, "is a run of mae: a predictor is I-JEPA's"),
        ("timm", {"network": "target_encoder"}, "has no target_encoder"),
        ("released", {"network": "encoder"}, "leave --network out"),
        ("released", {"image_size": (64, 64)}, "no place in released"),
        ("hf", {"image_size": (64, 64)}, "leave --image-size out"),
        ("hf", {"network": "predictor"}, "hf carries encoders"),
    ],
)
def test_exports_that_cannot_be_are_refused_in_one_line(run, tmp_path, form, options, says):
    with pytest.raises(UserError, match=says) as caught:
        export(str(run), form, tmp_path / "out", **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_layouts_refuse_what_they_cannot_carry(run, tmp_path):
    wide = make(tmp_path / "wide", replace(MODEL, image_size=(32, 64)))
    tokens = make(tmp_path / "tokens", replace(MODEL, registers=2))
    without = tmp_path / "without"
    plain = replace(MODEL, class_token=False)
    import_weights(Imported(plain, weights(plain), mae=CONFIG), "it", without, replace(saved_recipe(run), model=plain))
    second = ibot(run, tmp_path / "ibot")
    for source, form, says in (
        (wide, "hf", "square images alone"),
        (tokens, "hf", "cannot carry model.registers"),
        (tokens, "released", "cannot carry model.registers"),
        (without, "released", "this encoder has none"),
        (second, "hf", "cannot carry model.class_token"),
        (second, "released", "is a run of ibot: the released layouts are I-JEPA's and MAE's"),
    ):
        with pytest.raises(UserError, match=says):
            export(str(source), form, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    export(str(wide), "released", tmp_path / "out")  # whose size is told by the file
    assert torch.equal(load(tmp_path / "out")(images(1, 32, 64)), load(wide)(images(1, 32, 64)))


def damage(kind: str, state: dict[str, Tensor]) -> object:
    if kind in state:
        del state[kind]
    elif kind == "shape":
        state["decoder_blocks.1.mlp.fc2.bias"] = torch.zeros(7)
    elif kind == "pixels":
        state["decoder_pred.bias"] = torch.zeros(64)
    elif kind == "another method":
        state["head.weight"] = torch.zeros(10, 48)
    elif kind == "learned":
        state["pos_embed"] = torch.randn(1, 17, 48)
    elif kind == "class place":
        state["pos_embed"] = state["pos_embed"].clone()
        state["pos_embed"][:, 0] = 1
    elif kind == "not finite":
        state["norm.bias"] = torch.full((48,), float("nan"))
    elif kind == "no tensor":
        state["norm.bias"] = 3  # type: ignore[assignment]
    elif kind == "odd about":
        return {"model": state, "openjepa": 3}
    elif kind == "odd args":
        return {"model": state, "args": 3}
    elif kind == "empty":
        return {"model": {}}
    return {"model": state}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("blocks.1.mlp.fc2.bias", r"missing blocks\.1\.mlp\.fc2\.bias"),
        ("decoder_blocks.1.mlp.fc2.bias", r"decoder does not fit this model: missing blocks\.1\.mlp\.fc2\.bias"),
        ("decoder_embed.weight", "has no 'decoder_embed.weight'"),
        ("decoder_pos_embed", "has no 'pos_embed'"),
        ("mask_token", "missing mask_token"),
        ("cls_token", "has no 'cls_token': it is no MAE"),
        ("pos_embed", "has no 'pos_embed'"),
        ("shape", r"fc2\.bias is \[7\], expected \[32\]"),
        ("pixels", r"proj\.bias is \[64\], expected \[192\]"),
        ("another method", "unexpected head.weight"),
        ("learned", "not the fixed sine-cosine positions"),
        ("class place", "not the fixed sine-cosine positions"),
        ("not finite", "norm.bias is not finite"),
        ("no tensor", "no tensor of weights"),
        ("odd about", "not what it looks like"),
        ("odd args", "not what it looks like"),
        ("empty", "has no 'cls_token'"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(run, tmp_path, kind, says):
    export(str(run), "released", tmp_path / "good")
    state = torch.load(tmp_path / "good" / "checkpoint.pth", weights_only=True)["model"]
    torch.save(damage(kind, state), tmp_path / "x.pth")
    with pytest.raises(UserError, match=says) as caught:
        imported(tmp_path / "x.pth", tmp_path / "run", told=TOLD)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def change(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"decoder_num_hidden_layers": 3}, "says decoder_num_hidden_layers 3"),
        ({"num_hidden_layers": 3}, "says num_hidden_layers 3"),
        ({"decoder_num_attention_heads": 5}, "mae.decoder_heads"),
        ({"model_type": "ijepa"}, "has no 'embeddings.position_embeddings'"),
    ],
)
def test_odd_folders_are_refused_in_one_line(theirs, tmp_path, values, says):
    change(tmp_path / "theirs", **values)
    with pytest.raises(UserError, match=says) as caught:
        load(tmp_path / "theirs")
    assert len(str(caught.value).splitlines()) == 1


def test_commands_say_what_shapes_cannot(run, tmp_path, monkeypatch, capsys):
    export(str(run), "released", tmp_path / "out")
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    file = str(bare(state, tmp_path / "x.pth"))
    words = ["import", file, "--out", str(tmp_path / "a"), "--model.heads", "3"]
    assert "--mae.decoder_heads N" in refused(monkeypatch, capsys, *words)
    assert load(file, heads=3).network == "encoder"  # which needs no decoder
    with pytest.raises(UserError, match="its number of heads, openjepa import"):
        export(file, "hf", tmp_path / "b")
    assert "mae.decoder_heads" in refused(monkeypatch, capsys, *words, "--mae.decoder_heads", "x")
    status, said, _ = command(monkeypatch, capsys, *words, "--mae.decoder_heads", "4")
    assert status == 0
    assert "48 wide, 2 deep, 3 heads" in said
    assert saved_recipe(tmp_path / "a").mae == CONFIG


def test_a_decoder_is_not_dropped_by_a_recipe_that_has_none(run, tiny, tmp_path):
    export(str(run), "released", tmp_path / "out")
    base = replace(tiny, model=MODEL, predictor=replace(tiny.predictor, width=24), masking=saved_recipe(run).masking)
    with pytest.raises(UserError, match="holds a decoder, which ijepa has no place for"):
        imported(tmp_path / "out", tmp_path / "x", base, TOLD)

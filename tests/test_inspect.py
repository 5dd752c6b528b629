"""Claims about looking: colours are aligned, attention is the block's own, likeness is cosine; one command draws it all."""

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from openjepa.models.encoder import Encoder, Normalise
from openjepa.models.vit import ViT, ViTConfig
from openjepa.recipes.methods import starting
from openjepa.recipes.pretrain import pretrain
from openjepa.see.patches import Palette, attention, likeness, nearest
from tests.helpers import command, refused

PICTURES = {"masks.png", "pca.png", "attention.png", "likeness.png", "surprise.png", "neighbours.png"}


def features(images: int, patches: int = 12, width: int = 8) -> torch.Tensor:
    return torch.randn(images, patches, width, generator=torch.Generator().manual_seed(0))


def encoder(**values) -> Encoder:
    torch.manual_seed(0)
    vit = ViT(ViTConfig(size="Ti", image_size=(16, 24), patch_size=4, width=24, depth=3, heads=2, **values))
    return Encoder(vit.eval().requires_grad_(False), Normalise((0.5,) * 3, (0.2,) * 3), "encoder").eval()


PHOTOGRAPHS = torch.randint(0, 256, (5, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# ---------------------------------------------------------------- colours


def test_equal_features_have_equal_colours_in_all_images():
    x = features(6)
    palette = Palette.of(x)
    shifted = palette.centre[3] - palette.centre[7]
    again = x[:2].clone()
    again[1, 3] = x[0, 7] + shifted  # the same, less what is usual at each place
    colours = palette(again)
    assert np.allclose(colours[1, 3], colours[0, 7], atol=1e-4)


def test_colours_of_an_image_do_not_depend_on_those_beside_it():
    palette = Palette.of(features(20))
    assert np.allclose(palette(features(5))[:1], palette(features(5)[:1]))


@pytest.mark.parametrize("images", [2, 50])  # by singular values, and by the covariance
def test_colours_are_the_directions_of_most_variance(images):
    x = features(images, 16) * torch.tensor([1, 1, 9, 1, 5, 1, 3, 1.0])
    axes = Palette.of(x).axes
    assert axes.abs().argmax(0).tolist() == [2, 4, 6]
    assert torch.allclose(axes.T @ axes, torch.eye(3), atol=1e-5)


def test_position_has_no_colour_and_one_image_still_has_some():
    place = features(1)[0] * 10
    assert np.ptp(Palette.of(place + 0.01 * features(40))(place[None]), axis=1).max() < 0.2
    assert np.ptp(Palette.of(place[None])(place[None]), axis=1).min() > 0.9


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("values", [{}, {"qk_norm": True}, {"class_token": True, "registers": 2}])
@pytest.mark.parametrize("block", [0, 1, -1])
def test_attention_reproduces_the_blocks_output_and_its_rows_sum_to_one(values, block):
    net = encoder(**values)
    inside = {}
    module = net.vit.blocks[block].attn
    module.register_forward_hook(lambda m, args, out: inside.update(x=args[0], out=out))
    net(PHOTOGRAPHS)
    weights = module.weights(inside["x"])
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    v = module.qkv(inside["x"]).unflatten(-1, (3, 2, -1))[:, :, 2].transpose(1, 2)
    assert torch.allclose(module.proj((weights @ v).transpose(1, 2).flatten(2)), inside["out"], atol=1e-5)
    found = attention(net, PHOTOGRAPHS, block)
    assert torch.allclose(found, weights[:, :, net.vit.prefix :, net.vit.prefix :], atol=1e-6)
    assert found.shape == (5, 2, 24, 24)


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_is_not_there_is_refused(block):
    with pytest.raises(ValueError, match="0 to 2"):
        attention(encoder(), PHOTOGRAPHS, block)


# ---------------------------------------------------------------- likeness and neighbours


def test_likeness_is_cosine_with_the_patch_and_one_at_the_patch_itself():
    x, centre = features(3), features(1)[0] / 2
    for taken in (None, centre):
        found = likeness(x, 1, 4, taken)
        own = x if taken is None else x - taken
        assert float(found[1, 4]) == pytest.approx(1)
        assert float(found[2, 9]) == pytest.approx(
            float(torch.cosine_similarity(own[1, 4], own[2, 9], dim=0)), abs=1e-6
        )


def test_nearest_are_the_best_by_cosine_in_order():
    x = features(1, 30)[0]
    cosines, places = nearest(3 * x[:2], x, 5)
    every = torch.cosine_similarity(x[:2, None], x[None], dim=-1)
    assert places[:, 0].tolist() == [0, 1]
    assert torch.allclose(cosines, every.sort(descending=True).values[:, :5], atol=1e-6)
    assert nearest(x, x, 99)[1].shape == (30, 30)


# ---------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))


def look(monkeypatch, capsys, run: Path, out: Path, *words: str) -> tuple[str, dict]:
    status, text, errors = command(monkeypatch, capsys, "inspect", str(run), *words, "--out", str(out))
    assert status == 0, errors
    for line in text.splitlines():
        if ".png" in line:
            assert Path(line.split()[0]).exists()  # what is said to be written is
    return text, json.loads((out / "inspect.json").read_text())


def test_one_command_draws_all_there_is_of_an_image(monkeypatch, capsys, tmp_path, trained, folder):
    out = tmp_path / "out"
    text, told = look(
        monkeypatch, capsys, trained, out, str(folder / "red" / "03.png"), str(folder / "blue" / "04.png")
    )
    assert {file.name for file in out.iterdir()} == PICTURES | {"index.html", "inspect.json"}
    assert "note" not in text
    for name in PICTURES:
        with Image.open(out / name) as image:
            assert np.asarray(image.convert("L")).std() > 5
    page = (out / "index.html").read_text()
    assert page.count("<img") == 6
    assert told["patches"] == [[3, 5]]
    assert [set(entry) for entry in told["surprise"]] == [{"score", "above"}] * 2
    assert told["neighbours"][0][0] == {"path": "red/03.png", "cosine": 1.0}
    assert told["neighbours"][1][0] == {"path": "blue/04.png", "cosine": 1.0}


def test_images_of_a_source_and_other_sizes_are_looked_at(monkeypatch, capsys, tmp_path, trained, folder):
    wide = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 300, 4), dtype=np.uint8)).save(wide)
    options = [
        "--patch",
        "5,9",
        "--patch",
        "0,1",
        "--reference",
        str(folder),
        "--block",
        "2,2",
        "--attention-block",
        "0",
        "--crop",
        "0.8",
    ]
    _, told = look(monkeypatch, capsys, trained, tmp_path / "out", "scenes:2", str(wide), *options)
    assert told["images"] == ["scene 0", "scene 1", str(wide)]
    assert told["patches"] == [[5, 9], [0, 1]]
    assert (tmp_path / "out" / "index.html").read_text().count("What is like the patch 0,1</h2>") == 1
    of_two = {f"{what}-{patch}.png" for what in ("attention", "likeness") for patch in ("5-9", "0-1")}
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == PICTURES - {
        "attention.png",
        "likeness.png",
    } | of_two


@pytest.mark.parametrize("method", ["mae", "ibot"])
def test_methods_without_a_predictor_of_representations_say_so_and_draw_the_rest(
    monkeypatch, capsys, tmp_path, tiny, folder, method
):
    recipe = starting(tiny, method)
    recipe = replace(recipe, mae=replace(recipe.mae, decoder_width=16, decoder_depth=1, decoder_heads=2))
    if method == "ibot":
        recipe = replace(
            recipe, mae=type(recipe.mae)(), ibot=replace(recipe.ibot, prototypes=16, hidden=16, bottleneck=8)
        )
    pretrain(recipe, str(folder), tmp_path / "run", Console(quiet=True))
    out = tmp_path / "out"
    text, _ = look(monkeypatch, capsys, tmp_path / "run", out, str(folder / "red" / "03.png"))
    assert {file.name for file in out.glob("*.png")} == PICTURES - {"surprise.png"}
    assert text.count("note: ") == 1
    assert f"a run of {method}: surprise needs a predictor of representations" in text


def test_a_run_whose_images_are_gone_is_looked_at_without_them(monkeypatch, capsys, tmp_path, trained, folder):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text(json.dumps({"data": "gone", "images": 40, "fingerprint": ""}))
    out = tmp_path / "out"
    text, _ = look(monkeypatch, capsys, tmp_path / "run", out, str(folder / "red" / "03.png"))
    assert {file.name for file in out.glob("*.png")} == PICTURES - {"neighbours.png"}
    assert text.count("note: ") == 1
    assert "no images to compare with" in text


def bomb(path: Path) -> Path:
    """A PNG of a few bytes whose header asks for ten billion pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{run} {tmp}/none.png", "no such file or folder"),
        ("{run} {tmp}/text.png", "not an image"),
        ("{run} {tmp}/bomb.png", "100000x100000 pixels are more than the limit"),
        ("{run} {tmp}/small.png", "3x3 pixels are smaller than a patch of 4"),
        ("{run} {red} --patch 6,0", "--patch 6,0 is outside the grid of 6x10"),
        ("{run} {red} --patch 0,-1", "--patch 0,-1 is outside the grid"),
        ("{run} {red} --patch 4", "--patch 4: give 2 whole numbers"),
        ("{run} {red} --block 6,10", "does not fit"),
        ("{run} {red} --attention-block 2", "this encoder has 2, 0 to 1"),
        ("{run} {red} --reference {tmp}/none", "no such file or folder"),
        ("{run} {red} --device tpu9", "machine.device 'tpu9' cannot be used"),
        ("{run} {folder}", "more than 16 images"),
        ("{tmp} {red}", "is not a run"),
        ("{empty} {red}", "has no checkpoint yet"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(monkeypatch, capsys, tmp_path, trained, folder, words, says):
    (tmp_path / "text.png").write_text("hello")
    bomb(tmp_path / "bomb.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "small.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    told = words.format(run=trained, tmp=tmp_path, folder=folder, red=folder / "red" / "00.png", empty=empty).split()
    assert says in refused(monkeypatch, capsys, "inspect", *told, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(monkeypatch, capsys, tmp_path, trained, folder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    words = ["inspect", str(trained), str(folder / "red" / "00.png"), "--out", str(tmp_path / "mine")]
    assert "is not empty" in refused(monkeypatch, capsys, *words)

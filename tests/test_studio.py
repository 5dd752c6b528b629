"""Claims about the studio: its answers are the run's, and bad images and mistakes are told."""

import builtins
import json
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from openjepa.errors import UserError
from openjepa.studio import stage
from openjepa.studio import studio as studio_module
from openjepa.studio.studio import Studio
from tests.helpers import bomb, encoded, free_port, refused

# ---------------------------------------------------------------- answers


def test_the_context_hides_the_block_and_nothing_else(studio):
    looked = studio.pick(3)
    place = studio.place(looked, (1, 2, 2, 3))
    found = np.asarray(studio.context(looked, place))
    left, top, right, bottom = place.box
    assert (found[top:bottom, left:right] == 128).all()
    outside = np.ones(found.shape[:2], dtype=bool)
    outside[top - 1 : bottom + 1, left - 1 : right + 1] = False  # the outline lies around it
    assert np.array_equal(found[outside], looked.shown.permute(1, 2, 0).numpy()[outside])


def test_what_is_expected_does_not_depend_on_what_is_hidden_but_its_rank_does(studio):
    looked = next(x for x in map(studio.pick, range(40)) if not (studio.images == x.seen).flatten(1).all(1).any())
    place = studio.place(looked, (1, 2, 2, 3))
    other = looked.seen.clone()
    patch = studio.trained.recipe.model.patch_size
    other[:, patch : 3 * patch, 2 * patch : 5 * patch] = 255
    found, again = (studio.gallery.nearest(x, place.masks(), 5) for x in (looked.seen, other))
    assert found.places == again.places
    assert found.cosines == pytest.approx(again.cosines, abs=1e-5)
    assert found.cosines == sorted(found.cosines, reverse=True)
    tiles, text = studio.expected(looked, place)
    assert len(tiles) == studio_module.FOUND
    assert f"number {studio.gallery.nearest(looked.seen, place.masks(), 1).rank} of 21" in text


def test_the_rank_is_first_for_a_prediction_that_comes_true(studio, monkeypatch):
    """Asked with the block's own features instead of a prediction, nothing can be nearer than the block itself."""
    looked = studio.pick(3)
    place = studio.place(looked, (1, 2, 2, 3))
    monkeypatch.setattr(studio.gallery.condition, "of", "block")
    assert studio.gallery.nearest(looked.seen, place.masks(), 1).rank == 1


def test_an_image_of_the_gallery_is_not_looked_for_in_itself(studio):
    looked = next(x for x in map(studio.pick, range(40)) if (studio.images == x.seen).flatten(1).all(1).any())
    found = studio.gallery.nearest(looked.seen, studio.place(looked, studio.usual()).masks(), 99)
    assert len(found.places) == found.others == studio_module.GALLERY - 1
    assert not any(torch.equal(studio.images[i], looked.seen) for i in found.places)


def test_where_nothing_is_predicted_the_blocks_own_likes_are_shown_and_no_rank_or_surprise(another_method):
    looked = another_method.pick(3)
    tiles, text = another_method.expected(looked, another_method.place(looked, another_method.usual()))
    assert len(tiles) == studio_module.FOUND
    assert "nothing is predicted here" in text
    assert "number" not in text
    assert not another_method.predicts
    size = looked.shown.shape[:0:-1]
    assert another_method.colours(looked).size == another_method.like(looked, 0, 0).size == size
    with pytest.raises(UserError, match="surprise needs a predictor of representations"):
        another_method.surprise(looked)


def test_samples_are_the_decoders_and_another_seed_gives_others(studio):
    looked = studio.pick(0)
    place = studio.place(looked, studio.usual())
    first, again, other = (studio.samples(looked, place, seed) for seed in (0, 0, 1))
    assert len(first) == studio_module.SAMPLES
    assert np.array_equal(first[0][0], again[0][0])
    assert not np.array_equal(first[0][0], other[0][0])


def test_surprise_colours_and_likeness_are_pictures_of_the_image(studio):
    looked = studio.pick(1)
    size = looked.shown.shape[:0:-1]
    picture, text = studio.surprise(looked)
    assert picture.size == studio.colours(looked).size == studio.like(looked, 0, 0).size == size
    assert "of 10 images" in text
    assert not np.array_equal(studio.like(looked, 0, 0), studio.like(looked, 2, 3))


def test_a_click_means_the_patch_under_it(studio):
    looked = studio.pick(0)
    width, height = studio.clickable(looked).size
    rows, columns = studio.grid
    assert width == studio_module.CLICKABLE
    for row, column in ((0, 0), (2, 3), (rows - 1, columns - 1)):
        x, y = int((column + 0.5) * width / columns), int((row + 0.5) * height / rows)
        assert studio.patch_at(looked, x, y) == (row, column)
    assert studio.patch_at(looked, width, 10 * height) == (rows - 1, columns - 1)


def test_a_block_of_an_image_of_the_table_finds_itself_in_place(studio, folder):
    looked = studio.upload((folder / "red" / "03.png").read_bytes())
    (_, words), *others = studio.search(looked, studio.place(looked, (1, 2, 1, 1)))
    assert words.startswith("1.000")
    assert words.endswith("red/03.png")
    assert len(others) == studio_module.FOUND - 1
    assert len(studio.search(looked, None)) == studio_module.FOUND


def test_a_table_of_another_run_and_a_decoder_of_another_step_are_refused(studio, trained, decoder):
    earlier = trained / "checkpoints" / sorted(p.name for p in (trained / "checkpoints").iterdir())[0]
    with pytest.raises(UserError, match="made for another encoder"):
        Studio(str(earlier), str(decoder))
    with pytest.raises(UserError, match="other weights"):
        Studio(str(earlier), table=str(studio.table.folder))


@pytest.mark.parametrize("block", [(0, 0, 0, 1), (-1, 0, 1, 1), (5, 9, 2, 1), (0, 0, 6, 10), (0, 0, 99, 1)])
def test_a_block_that_is_none_is_told(studio, block):
    with pytest.raises(UserError, match="block"):
        studio.place(studio.pick(0), block)


@pytest.mark.parametrize("sent", [None, "x", {}, {"top": 1}, {"top": 1.5, "left": 0, "height": 1, "width": 1},
                                  {"top": "1", "left": 0, "height": 1, "width": 1}])  # fmt: skip
def test_what_a_browser_sends_is_a_block_or_nothing(sent):
    assert stage.block(sent) is None
    assert stage.block({"top": 1, "left": 2, "height": 3, "width": 4, "image": "…"}) == (1, 2, 3, 4)


# ---------------------------------------------------------------- bad images


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "an empty file"),
        (b"<html>no image", "not an image"),
        (encoded(Image.new("RGB", (400, 400), "red"), "JPEG")[:300], "image"),
        (bomb(50_000, 50_000), "50000x50000 pixels are more than the 50 million"),
        (encoded(Image.new("RGB", (3, 100)), "PNG"), "smaller than a patch of 4"),
        (bytes(studio_module.MOST_BYTES + 1), "20 MB are more than the 20"),
    ],
)
def test_an_upload_that_cannot_be_looked_at_is_told(studio, raw, said):
    with pytest.raises(UserError, match=said):
        studio.upload(raw)


def test_an_upload_too_large_is_never_decoded(studio, monkeypatch):
    monkeypatch.setattr(studio_module, "seen", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="million"):
        studio.upload(encoded(Image.new("L", (8000, 8000)), "PNG"))


def test_an_upright_photograph_of_any_mode_is_taken(studio):
    for mode in ("L", "RGBA", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        looked = studio.upload(encoded(Image.new(mode, (90, 50)), kind))
        assert looked.seen.shape == (3, 24, 40)


# ---------------------------------------------------------------- the command


def test_a_port_in_use_is_told_before_anything_is_loaded(monkeypatch, capsys, trained, tmp_path):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        error = refused(monkeypatch, capsys, "studio", str(tmp_path / "none"), "--port", str(port))
    assert f"port {port} of 127.0.0.1 is in use" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tmp}"], "is not a run"),
        (["{empty}"], "has no checkpoint yet"),
        (["{run}", "--port", "99999"], "give 1 to 65535"),
        (["{run}", "--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["{run}", "--decoder", "{run}"], "is no decoder"),
        (["{run}", "--table", "{tmp}"], "no table"),
        (["{decoder}"], "is a decoder and holds no encoder"),
    ],
)
def test_what_the_studio_cannot_show_is_told_in_one_line(monkeypatch, capsys, trained, decoder, tmp_path, words, said):
    pytest.importorskip("gradio")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(trained / "recipe.yaml", empty)
    names = {"tmp": tmp_path, "empty": empty, "run": trained, "decoder": decoder}
    port = [] if "--port" in words else ["--port", str(free_port())]
    assert said in refused(monkeypatch, capsys, "studio", *(word.format(**names) for word in words), *port)


def test_a_run_whose_images_are_gone_asks_for_others(trained, folder, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "data.json").write_text(json.dumps(json.loads((run / "data.json").read_text()) | {"data": "gone/images"}))
    with pytest.raises(UserError, match=r"'gone/images'.*name some, --data SPEC"):
        Studio(str(run), device="cpu")
    assert len(Studio(str(run), data=str(folder), device="cpu").source) > 0


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys, trained):
    imported = builtins.__import__

    def without(name, *rest, **more):
        if name == "gradio":
            raise ImportError("none", name="gradio")
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'openjepa[studio]'" in refused(monkeypatch, capsys, "studio", str(trained))

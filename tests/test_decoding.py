"""Claims about `openjepa decode`: a decoder resumes to the bit and knows whose it is; figures are made, mistakes refused."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import openjepa
from openjepa.decoder.condition import Condition
from openjepa.decoder.faithful import OTHER, OWN, REAL, WRONG
from openjepa.decoder.paint import Sampling
from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.run import read_metrics
from openjepa.errors import UserError
from openjepa.masking import Masks
from openjepa.recipes.decoder import small
from openjepa.recipes.decoding import Decoder, hidden, load_decoder, show, train
from openjepa.recipes.exchange import load_run
from openjepa.recipes.faithfulness import FAITHFULNESS, check
from openjepa.recipes.methods import METHODS
from openjepa.recipes.pretrain import saved_recipe
from openjepa.see.sheet import Cell, draw, sheet
from tests.conftest import recipe_of
from tests.helpers import PAINTER, PAINTS, command, encoded, refused, same
from tests.test_parallel import ENVIRONMENT, launch

QUIET = Console(quiet=True)
FEW = Sampling(steps=4)


@pytest.fixture(scope="module")
def loaded(trained: Path, decoder: Path) -> Decoder:
    return load_decoder(str(trained), str(decoder), "cpu")


# ---------------------------------------------------------------- the engine


def test_a_decoder_trains_logs_and_asks_for_no_features(decoder):
    records = read_metrics(decoder)
    assert len(records) == 10
    assert all("loss" in record and "context_tokens" in record for record in records)
    assert not any("feature_rank" in record or "knn_accuracy" in record for record in records)
    (weights,) = {name.partition(".")[0] for name in checkpoints(decoder)[-1].weights()} - {"denoiser"}
    assert weights == "average"


def test_a_stopped_decoder_ends_in_the_same_bits(trained, decoder, folder, tmp_path):
    again, moved_run = tmp_path / "again", tmp_path / "elsewhere"
    shutil.copytree(decoder, again)
    shutil.copytree(trained, moved_run)
    for found in checkpoints(again)[1:]:
        shutil.rmtree(found.path)
    train(str(moved_run), str(folder), again, None, {}, QUIET)  # wherever the run lies
    ours, theirs = checkpoints(again)[-1], checkpoints(decoder)[-1]
    assert ours.step == theirs.step == 10
    assert same(ours.weights(), theirs.weights())
    assert same(ours.optimizer(), theirs.optimizer())
    assert saved_recipe(again).rcdm.run == str(moved_run)


def test_another_run_is_refused_by_its_fingerprint(trained, decoder, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    shutil.rmtree(checkpoints(other)[-1].path)
    with pytest.raises(UserError, match="made for another encoder"):
        load_decoder(str(other), str(decoder))
    with pytest.raises(UserError, match="made for another encoder"):
        train(str(other), str(folder), decoder, None, {}, QUIET)
    for source in (decoder, decoder / "checkpoints" / "step-00000010"):
        with pytest.raises(UserError, match="is a decoder and holds no encoder"):
            openjepa.load(source)
    with pytest.raises(UserError, match="is a decoder and holds no encoder"):
        load_run(decoder)


TOGETHER = """
import sys
from pathlib import Path
from rich.console import Console
from openjepa.engine.launch import joined
from openjepa.recipes.decoding import train
from openjepa.recipes.decoder import small
from tests.helpers import PAINTER, PAINTS
run, data, out = sys.argv[1:]
with joined():
    for name, more in (("ddp", {}), ("fsdp", {"machine.strategy": "fsdp", "machine.recompute": "full"})):
        train(run, data, Path(out) / name, small(PAINTER, 2), PAINTS | more, Console(quiet=True))
"""


@pytest.mark.slow
def test_two_processes_make_the_decoder_of_one(trained, decoder, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(Path(__file__).parents[1]))
    done = launch(2, TOGETHER, tmp_path, trained, folder, tmp_path)
    assert done.returncode == 0, done.err
    alone = checkpoints(decoder)[-1].weights()
    for name in ("ddp", "fsdp"):
        weights = checkpoints(tmp_path / name)[-1].weights()
        assert weights.keys() == alone.keys()
        assert all(torch.allclose(weights[k], alone[k], atol=1e-3) for k in alone)


# ---------------------------------------------------------------- commands


def test_the_papers_figure_is_made(trained, decoder, folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "figures" / "samples.png"
    words = ["decode", "sample", str(trained), str(folder), str(folder / "red" / "00.png"), "--rows", "2", "--samples", "3",
             "--steps", "3", "--decoder", str(decoder), "--device", "cpu", "--each"]  # fmt: skip
    status, _, error = command(monkeypatch, capsys, *words, "--out", str(out))
    assert (status, error) == (0, "")
    about = json.loads(Image.open(out).text["openjepa"])
    assert (about["seed"], about["steps"], about["sampler"], about["decoder_step"]) == (0, 3, "ddpm", 10)
    assert about["images"] == ["blue/00.png", "blue/01.png", str(folder / "red" / "00.png")]
    assert len(list(out.parent.glob("samples-*.png"))) == 9
    left, top, right, bottom = about["boxes"][2]
    given = np.asarray(Image.open(folder / "red" / "00.png")).astype(int)
    painted = np.asarray(Image.open(out.with_name("samples-2-1.png"))).astype(int)
    differs = (given != painted).any(-1)
    assert differs[top:bottom, left:right].any()
    differs[top:bottom, left:right] = False
    assert not differs.any()
    again = out.with_name("again.png")
    command(monkeypatch, capsys, *words[:-1], "--out", str(again))
    assert (np.asarray(Image.open(out)) == np.asarray(Image.open(again))).all()


def test_an_image_is_completed_at_its_own_size(trained, decoder, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 160, 3)).astype(np.uint8)).save(picture)
    out = tmp_path / "done.png"
    words = ["decode", "complete", str(trained), str(picture), "--decoder", str(decoder), "--box", "20,20,50,30",
             "--out", str(out), "--steps", "2", "--samples", "2", "--each", "--device", "cpu"]  # fmt: skip
    status, told, error = command(monkeypatch, capsys, *words)
    assert (status, error) == (0, "")
    assert "widened to whole patches: 16,16,64,48" in told
    made = np.asarray(Image.open(tmp_path / "done-0-1.png")).astype(int)
    assert made.shape == (96, 160, 3)
    differs = (made != np.asarray(Image.open(picture))).any(-1)
    differs[16:64, 16:80] = False
    assert not differs.any()


def test_a_photograph_is_completed_whole_and_its_sheet_is_no_wider_than_a_screen_or_two(
    trained, decoder, monkeypatch, capsys, tmp_path
):
    picture, out = tmp_path / "photo.jpg", tmp_path / "done.png"
    Image.new("RGB", (3000, 1500), (40, 90, 160)).save(picture)
    words = ["decode", "complete", str(trained), str(picture), "--decoder", str(decoder), "--box", "1000,500,700,600",
             "--out", str(out), "--steps", "2", "--samples", "2", "--each", "--device", "cpu"]  # fmt: skip
    status, told, error = command(monkeypatch, capsys, *words)
    assert (status, error) == (0, "")
    assert "shown at 1024 pixels a side; --each" in told
    assert Image.open(tmp_path / "done-0-1.png").size == (3000, 1500)
    assert Image.open(out).width < 3 * 1024 + 200


def test_no_picture_is_written_over_but_its_own(trained, decoder, monkeypatch, capsys, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40), (9, 90, 160)).save(photo)
    before = photo.read_bytes()
    words = ["decode", "complete", str(trained), str(photo), "--decoder", str(decoder), "--box", "8,8,20,16",
             "--steps", "2", "--samples", "2", "--device", "cpu", "--out"]  # fmt: skip
    assert "is what is asked about" in refused(monkeypatch, capsys, *words, str(photo))
    other = tmp_path / "out-0-1.png"
    other.write_bytes(before)
    assert "no picture of openjepa's" in refused(monkeypatch, capsys, *words, str(tmp_path / "out.png"), "--each")
    assert photo.read_bytes() == other.read_bytes() == before
    other.unlink()
    for _ in range(2):  # its own are written over
        assert command(monkeypatch, capsys, *words, str(tmp_path / "out.png"), "--each")[0] == 0


def test_what_the_encoder_does_not_see_is_pale(loaded):
    wide = show(loaded, "wide", np.zeros((32, 96, 3), np.uint8), (40, 8, 12, 12), 0, 0)
    given = hidden(wide)
    left, _, right, _ = map(round, wide.place.window)
    assert 20 < right - left < 96
    assert given[:, 0, left:right].max() == 0
    assert (torch.cat([given[:, 0, :left], given[:, 0, right:]], 1) == 178).all()


def test_images_of_all_sizes_are_about_as_large_in_a_sheet():
    cells = [Cell(torch.zeros(3, h, w, dtype=torch.uint8)) for h, w in ((32, 32), (200, 600), (5, 4))]
    sizes = [draw(cell, 600).size for cell in cells]
    assert sizes == [(608, 608), (600, 200), (480, 600)]


def test_an_outline_stays_around_its_box_in_a_shrunk_image():
    pixels = torch.zeros(3, 2048, 4096, dtype=torch.uint8)
    pixels[:, 400:800, 1200:2000] = 255
    found = np.asarray(draw(Cell(pixels, (1200, 400, 2000, 800)))).astype(int)
    assert found.shape == (512, 1024, 3)
    assert (found[102:198, 302:498] == 255).all()
    green = (found == (0, 170, 80)).all(-1)
    assert green[100 - 3, 300:500].all()
    assert not green[101:199, 301:499].any()


@pytest.mark.parametrize("side", [60, 128, 1500])
def test_a_sheets_heads_are_a_twentieth_of_its_images_and_12_pixels_at_least(side):
    cell = Cell(torch.zeros(3, side, side, dtype=torch.uint8))
    found = np.asarray(sheet([[cell, cell]], ["given", "hypothesis 0"]).convert("L")).astype(int)
    image = draw(cell).height
    above = found.shape[0] - image - max(12, image // 20) // 2  # the gap below
    written = np.flatnonzero((found[:above] < 200).any(1))
    assert 0.6 <= (written[-1] - written[0] + 1) / max(12, image // 20) <= 1.2
    assert written[-1] < above - 1  # and none of it on an image


def test_faithfulness_is_told_with_controls_and_intervals(trained, decoder, folder, tmp_path):
    random = tmp_path / "random"
    train(str(trained), str(folder), random, small(replace(PAINTER, networks="random"), 2), PAINTS | {"schedule.epochs": "0.2"},
          QUIET)  # fmt: skip
    file = check(str(trained), str(decoder), str(folder), images=16, gallery=24, samples=2, sampling=FEW, console=QUIET,
                 control=str(random), out=tmp_path, device="cpu")  # fmt: skip
    record = json.loads(file.read_text())
    assert set(record["conditions"]) == {OWN, OTHER, "the mean", WRONG, "random encoder's", REAL}
    assert set(record["ahead"]) == {OTHER, "the mean", WRONG, "random encoder's"}
    for metrics in record["conditions"].values():
        for told in metrics.values():
            assert told["interval"][0] <= told["value"] <= told["interval"][1]
    assert record["conditions"][REAL]["mrr"]["value"] > record["conditions"][OTHER]["mrr"]["value"]
    assert record["conditions"][OWN]["pixel_change"]["value"] == 0
    assert record["conditions"][WRONG]["pixel_change"]["value"] > 0
    with pytest.raises(UserError, match="train one with"):
        check(str(trained), str(decoder), str(folder), images=16, gallery=24, samples=2, sampling=FEW, console=QUIET,
              control=str(decoder), out=tmp_path, device="cpu")  # fmt: skip
    kept = shutil.copytree(decoder, tmp_path / "kept")
    about = {"images": 16, "samples": 4, "conditions": {OWN: {}, "random encoder's": {}}}
    (kept / FAITHFULNESS).write_text(json.dumps(about))
    for many in (2, 4):  # fewer, and as many without a control
        with pytest.raises(UserError, match="holds a check of 16 images x 4 samples and a control: --out FOLDER"):
            check(
                str(trained), str(kept), str(folder), images=16, gallery=24, samples=many, sampling=FEW, console=QUIET
            )
    assert json.loads((kept / FAITHFULNESS).read_text()) == about
    with pytest.raises(UserError, match="give a multiple of 8"):
        check(str(trained), str(decoder), str(folder), images=20, gallery=24, samples=2, sampling=FEW, console=QUIET)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ("30,30,20,20", "reaches outside the image of 40x36 pixels"),
        ("-1,2,5,5", "reaches outside"),
        ("4,4,0,5", "is empty"),
        ("4,4,5", "give x,y,width,height"),
        ("a,b,c,d", "give x,y,width,height"),
        ("0,6,40,24", "covers all that the encoder sees"),
        ("0,0,40,30", "is larger than what the encoder sees"),
    ],
)
def test_boxes_that_cannot_be_are_refused(trained, decoder, folder, monkeypatch, capsys, tmp_path, box, told):
    words = ("decode", "complete", str(trained), str(folder / "red" / "00.png"), "--decoder", str(decoder), f"--box={box}",
             "--out", str(tmp_path / "x.png"))  # fmt: skip
    assert told in refused(monkeypatch, capsys, *words)
    assert not (tmp_path / "x.png").exists()


def test_images_that_are_none_are_refused(trained, decoder, loaded, monkeypatch, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (3, 2)).save(tmp_path / "small.png")
    for name, told in (
        ("text.png", "not an image"),
        ("small.png", "smaller than a patch"),
        ("none.png", "No such file"),
    ):
        words = ("decode", "sample", str(trained), str(tmp_path / name), "--decoder", str(decoder), "--out", "x.png")
        assert told in refused(monkeypatch, capsys, *words)
    words = (
        "decode",
        "sample",
        str(trained),
        str(tmp_path),
        "--decoder",
        str(decoder),
        "--out",
        "x.png",
        "--samples",
        "0",
    )
    assert "--samples 0: give 1 or more" in refused(monkeypatch, capsys, *words)
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(UserError, match="more than the limit"):
        show(loaded, "bomb", bomb, None, 0, 0)


def test_a_place_that_takes_no_png_is_refused_before_anything_is_painted(monkeypatch, capsys, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for out, told in (
        ("a.jpg", "of the kind .png"),
        ("folder.png", "of the kind .png"),
        ("file/a.png", "cannot write to"),
    ):
        words = ("--decoder", "none", "--out", str(tmp_path / out))
        assert told in refused(monkeypatch, capsys, "decode", "sample", "none", "none.png", *words)
        assert told in refused(
            monkeypatch, capsys, "decode", "complete", "none", "none.png", "--box", "0,0,1,1", *words
        )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.depth", "3"], "--model.depth is what the run says"),
        (["--rcdm.fingerprint", "0"], "what the run says"),
        (["--recipe", "ijepa_scenes"], "is of ijepa, which is no decoder"),
        (["--rcdm.size", "9"], "rcdm.size 9 cannot be halved"),
        (["--rcdm.of", "image"], "set rcdm.paint image"),
        (["--rcdm.of", "all"], "one of 'prediction', 'block', 'image'"),
        (["--loss.kind", "l2"], "'loss' is a part of ijepa"),
    ],
)
def test_decoders_that_cannot_be_are_refused(trained, folder, monkeypatch, capsys, tmp_path, words, told):
    words = ["decode", "train", str(trained), "--data", str(folder), "--out", str(tmp_path / "d"), *words]
    assert told in refused(monkeypatch, capsys, *words)
    assert not (tmp_path / "d").exists()


def test_a_decoder_is_trained_for_a_run_alone(folder, monkeypatch, capsys, tmp_path):
    words = ("pretrain", "--recipe", "rcdm_32_cpu", "--data", str(folder), "--out", str(tmp_path / "d"))
    assert "openjepa decode train RUN" in refused(monkeypatch, capsys, *words)


def test_a_method_that_predicts_no_features_has_other_conditions(trained, loaded):
    for name in ("mae", "ibot"):
        recipe = recipe_of(name)
        method = METHODS[name].build(recipe)
        with pytest.raises(UserError, match=re.escape("--rcdm.of block or --rcdm.of image")):
            Condition(method, "prediction")
        images = torch.rand(2, 3, 32, 32)
        masks = Masks(torch.arange(4, 64).expand(2, 1, -1), torch.arange(4).expand(2, 1, -1))
        assert Condition(method, "block")(images, masks).shape == (2, 24)
        assert Condition(method, "image")(images, masks).shape == (2, 24)


def test_an_oracle_completes_nothing(trained, folder, monkeypatch, capsys, tmp_path):
    oracle = tmp_path / "oracle"
    train(str(trained), str(folder), oracle, small(replace(PAINTER, of="image", paint="image"), 2),
          PAINTS | {"schedule.epochs": "0.2"}, QUIET)  # fmt: skip
    picture = str(folder / "red" / "00.png")
    words = ("--decoder", str(oracle), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "x.png"))
    told = refused(monkeypatch, capsys, "decode", "complete", str(trained), picture, "--box", "8,8,8,8", *words)
    assert "takes a decoder of predictions" in told
    assert command(monkeypatch, capsys, "decode", "sample", str(trained), picture, *words)[0] == 0
    assert (tmp_path / "x.png").exists()


def test_a_missing_library_is_named(trained, folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    words = ("decode", "train", str(trained), "--data", str(folder), "--out", str(tmp_path / "d"))
    assert "pip install 'openjepa[decode]'" in refused(monkeypatch, capsys, *words)

"""Claims about surprise: the map is what it says, a planted error is found, and the command writes both."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from openjepa.data.sources import open_source
from openjepa.errors import UserError
from openjepa.evaluate.surprise import Surprise, Usual, outside, pixels, score, sliding, usual_block
from openjepa.masking import Masks
from openjepa.methods.ijepa import LossConfig
from openjepa.models.encoder import Normalise
from openjepa.recipes.exchange import load_run
from openjepa.recipes.ijepa import ijepa_scenes
from openjepa.recipes.oddity import Question, score_images
from openjepa.recipes.pretrain import build, pretrain
from openjepa.recipes.surprise import PatchView, judge_of, surprise_of
from tests.helpers import annotated, command, refused

MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


def photographs(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (2, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sliding_blocks_cover_every_patch_and_are_rectangles(grid, stride):
    blocks = sliding(grid, (2, 3), stride)
    assert set(blocks.flatten().tolist()) == set(range(grid[0] * grid[1]))
    for block in blocks:
        rows, columns = block // grid[1], block % grid[1]
        assert len(rows.unique()) == 2
        assert len(columns.unique()) == 3
        assert int(columns.max() - columns.min()) == 2  # not around an edge
    rest = outside(blocks, grid[0] * grid[1])
    for block, seen in zip(blocks.tolist(), rest.tolist(), strict=True):
        assert sorted(block + seen) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("block", "stride", "says"),
    [((9, 2), 1, "does not fit"), ((8, 8), 1, "does not fit"), ((0, 1), 1, "does not fit"), ((2, 3), 3, "leaves gaps")],
)
def test_blocks_that_hide_nothing_or_all_are_refused(block, stride, says):
    with pytest.raises(UserError, match=says):
        sliding((8, 8), block, stride)


def test_the_usual_block_is_of_the_targets_size():
    assert usual_block((14, 14), (0.15, 0.2)) == (6, 6)
    assert usual_block((8, 8), (0.15, 0.2)) == (3, 3)
    assert usual_block((2, 2), (0.9, 1.0)) == (1, 1)


# ---------------------------------------------------------------- energies


@pytest.mark.parametrize(
    "loss",
    [LossConfig(), LossConfig(kind="l2"), LossConfig(target="pixels"), LossConfig(target_mask="input")],
    ids=["released", "l2", "pixels", "input"],
)
def test_the_map_equals_a_plain_double_loop(tiny, loss):
    """One image and one block at a time, the energies of its patches by the method's own loss."""
    recipe = replace(tiny, loss=loss, model=replace(tiny.model, image_size=(20, 28)))
    method, grid = build(recipe).eval().requires_grad_(False), (5, 7)
    images = photographs(3, 20, 28)
    surprise = Surprise(method, Normalise(MEAN, STD), torch.no_grad, (2, 3))
    found, remains = surprise(images)
    for i in range(3):
        image = Normalise(MEAN, STD)(images[i : i + 1])
        total, count, over = torch.zeros(grid), torch.zeros(grid), torch.zeros(35, remains.shape[-1])
        for top in range(4):
            for left in range(5):
                hidden = torch.zeros(grid, dtype=torch.bool)
                hidden[top : top + 2, left : left + 3] = True
                context, block = (~hidden).flatten().nonzero()[:, 0], hidden.flatten().nonzero()[:, 0]
                guess = method.predictor(method.encoder(image, context[None]), context[None], block[None, None])[0, 0]
                target = method.targets(image, Masks(context[None, None], block[None, None]))[0, 0]
                for k, patch in enumerate(block.tolist()):
                    energy = method.loss(guess[k][None, None, None], target[k][None, None, None])
                    total[patch // 7, patch % 7] += energy[0]
                    count[patch // 7, patch % 7] += 1
                    over[patch] += target[k] - guess[k]
        assert torch.allclose(found[i], total / count, rtol=1e-4, atol=1e-6)
        assert torch.allclose(remains[i], over / count.view(-1, 1), rtol=1e-3, atol=1e-5)


def test_the_mean_of_a_blocks_energies_is_the_methods_own_loss(tiny):
    method = build(tiny).eval()
    images, block = photographs(2), sliding((8, 8), (8, 4))[:1]
    surprise = Surprise(method, Normalise(MEAN, STD), torch.no_grad, (8, 4), 4)  # two halves, each seen once
    halves = [
        Masks(outside(half, 64).expand(2, 1, -1), half.expand(2, 1, -1)) for half in sliding((8, 8), (8, 4), 4).split(1)
    ]
    own = torch.stack([method(Normalise(MEAN, STD)(images), masks)["losses"] for masks in halves]).mean(0)
    assert block.shape == (1, 32)
    assert torch.allclose(surprise.energies(images).mean((1, 2)), own, rtol=1e-5)


def test_batches_and_chunks_change_nothing(tiny, monkeypatch):
    method = build(tiny).eval()
    images = photographs(5)
    whole = Surprise(method, Normalise(MEAN, STD), torch.no_grad, (3, 3)).remains(images)
    monkeypatch.setattr("openjepa.evaluate.surprise.TOKENS", 64 * 7)
    parts = torch.cat(
        [Surprise(method, Normalise(MEAN, STD), torch.no_grad, (3, 3)).remains(part) for part in images.split(2)]
    )
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-5)


def test_a_planted_error_is_localised(tiny):
    """A predictor that is right but at one patch of one image."""
    method = build(tiny).eval()
    images = photographs(4)
    normalise = Normalise(MEAN, STD)
    truth = method.loss.levelled(method.target_encoder(normalise(images)))
    wrong = truth.clone()
    wrong[2, 5 * 8 + 6] += 3

    class Oracle(torch.nn.Module):
        def forward(self, context, visible, targets, ragged=None):
            return torch.stack([wrong[self.of[i], block] for i, block in enumerate(targets[:, 0])])[:, None]

    oracle = Oracle()
    encode = method.encode_context

    def remember(normalised, masks, c):  # which of the images each row of a chunk is
        flat, all_ = normalised.flatten(1), normalise(images).flatten(1)
        oracle.of = [int((all_ == row).all(1).nonzero()[0]) for row in flat]
        return encode(normalised, masks, c)

    method.encode_context, method.predictor = remember, oracle
    found, remains = Surprise(method, normalise, torch.no_grad, (3, 3))(images)
    assert float(found[2, 5, 6]) > 1
    assert torch.allclose(remains[2, 5 * 8 + 6], torch.tensor(-3.0), atol=1e-4)
    found[2, 5, 6] = 0
    assert float(found.abs().max()) < 1e-6


def test_controls_are_features_and_pixels_of_the_same_patches(tiny):
    method, images = build(tiny).eval(), photographs(2)
    found = Surprise(method, Normalise(MEAN, STD), torch.no_grad, (3, 3)).features(images)
    assert torch.allclose(found, method.loss.levelled(method.target_encoder(Normalise(MEAN, STD)(images))))
    assert torch.equal(pixels(images, 4)[1, 8 * 5 + 6].view(3, 4, 4), images[1, :, 20:24, 24:28] / 255)


# ---------------------------------------------------------------- what is usual


def remains(count: int, seed: int = 0) -> torch.Tensor:
    """Of 6 places in 4 directions, of which one varies a hundred times as much as another; each place has its own mean."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)))[0]
    place = 5 * torch.randn(6, 4, generator=torch.Generator().manual_seed(8))
    return torch.randn(count, 6, 4, generator=generator) * torch.tensor([10.0, 1, 1, 0.1]) @ mixed.T + place


def test_what_is_usual_is_the_mahalanobis_distance_a_direction(monkeypatch):
    monkeypatch.setattr("openjepa.evaluate.surprise.RIDGE", 0)
    parts = remains(3000)
    usual = Usual.of(parts.split(700))
    centred = (parts - parts.mean(0)).double()
    precision = torch.linalg.inv(centred.flatten(0, 1).T @ centred.flatten(0, 1) / (6 * 2999))
    new = remains(5, seed=1)
    off = (new - parts.mean(0)).double()
    expected = torch.einsum("bnd,de,bne->bn", off, precision, off) / 4
    assert np.allclose(usual(new), expected.numpy(), rtol=1e-2)
    assert np.allclose(Usual.of([parts])(new), usual(new), rtol=1e-3)


def test_an_error_in_a_direction_that_never_varies_is_more_unusual_than_a_larger_one_where_all_vary():
    usual, calm = Usual.of([remains(500)]), remains(500).mean(0)[None].clone()
    mixed = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)))[0]
    loud, odd = calm.clone(), calm.clone()
    loud[0, 2] += 5 * mixed[:, 0]
    odd[0, 2] += 2 * mixed[:, 3]
    assert usual(odd).argmax() == 2
    assert float(usual(odd)[0, 2]) > 5 * float(usual(loud)[0, 2])
    assert float(usual(calm).max()) < 1e-3


def test_the_reference_itself_is_usual_and_its_scores_are_kept_in_order():
    parts = remains(300)
    usual = Usual.of(parts.split(7))
    assert float(usual(parts).mean()) == pytest.approx(1, abs=0.25)  # the ridge takes a little of the calmest direction
    assert len(usual.scores) == 64
    assert (np.diff(usual.scores) >= 0).all()


def test_reference_images_are_judged_by_the_others_as_new_ones_are_by_all():
    generator = torch.Generator().manual_seed(0)
    few, new = (torch.randn(n, 4, 40, generator=generator) for n in (50, 2000))
    usual = Usual.of(few.split(7))
    alone = [score(Usual.of([torch.cat([few[:i], few[i + 1 :]])])(few[i][None]))[0] for i in range(50)]
    assert np.allclose(usual.scores, np.sort(alone), rtol=1e-4)
    under = [(usual.scores < s).mean() for s in score(usual(new))]
    assert np.mean(under) == pytest.approx(0.5, abs=0.07)
    assert (
        np.mean([(np.sort(score(usual(few))) < s).mean() for s in score(usual(new))]) > 0.8
    )  # were they judged by themselves, too


def test_fewer_images_than_directions_still_say_what_is_usual():
    few = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(Usual.of([few])(few)).all()
    same = torch.ones(3, 4, 5)
    assert float(Usual.of([same])(same).max()) < 1e-3


def test_one_image_is_no_reference():
    with pytest.raises(UserError, match="reference of 1 images"):
        Usual.of([torch.zeros(1, 2, 2)])


# ---------------------------------------------------------------- the command


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_scores_and_maps_are_written_and_said_to_be_worth_something(
    monkeypatch, capsys, tmp_path, trained, folder, cache
):
    data, out = annotated(tmp_path / "a"), tmp_path / "out" / "scores.parquet"
    words = ["surprise", str(trained), "--reference", str(folder), "--data", str(data), "--out", str(out)]
    status, text, errors = command(monkeypatch, capsys, *words)
    assert status == 0, errors
    table = pq.read_table(out)
    about = json.loads(table.schema.metadata[b"openjepa"])
    assert (about["rows"], about["columns"]) == (6, 10)
    assert table.column_names == ["id", "path", "label", "score", "map", "energy", "odd"]
    assert table.schema.field("map").type.list_size == 60
    assert table["path"].to_pylist() == [f"{i}.png" for i in range(10)]
    maps = np.array(table["map"].to_pylist(), dtype=np.float32).reshape(10, 6, 10)
    assert np.allclose(score(maps), table["score"].to_numpy())
    told = json.loads(out.with_suffix(".json").read_text())
    of = {"surprise", "bare energy", "nothing predicted", "random weights", "raw pixels"}
    metrics = {"image AUROC", "pixel AUROC", "PRO", "first guess"}
    assert {(r["of"], r["metric"]) for r in told["results"]} == {(o, m) for o in of for m in metrics}
    value = {(r["of"], r["metric"]): r["value"] for r in told["results"]}
    assert value["raw pixels", "image AUROC"] > 0.9
    assert "nothing predicted" in text

    def never(parts):
        raise AssertionError("the statistics are there")

    kept = list((cache / "surprise").iterdir())
    assert len(kept) == 1
    trained_run, source = load_run(trained), open_source(str(folder))
    energy = surprise_of(trained_run)
    monkeypatch.setattr(Usual, "of", never)
    judge_of(energy, trained_run, source, PatchView((24, 40), patch=4))
    with pytest.raises(AssertionError):
        judge_of(surprise_of(trained_run, (1, 1)), trained_run, source, PatchView((24, 40), patch=4))


def test_without_truth_scores_are_written_and_it_is_said(monkeypatch, capsys, tmp_path, trained, folder, cache):
    out = tmp_path / "s.parquet"
    words = ["surprise", str(trained), "--reference", str(folder), "--data", str(folder), "--out", str(out)]
    status, text, errors = command(monkeypatch, capsys, *words)
    assert status == 0, errors
    assert "nothing says what is odd" in text
    assert set(pq.read_table(out)["label"].to_pylist()) == {"blue", "red"}
    assert not out.with_suffix(".json").exists()


def test_what_cannot_be_read_is_left_out_and_named(monkeypatch, capsys, tmp_path, trained, folder, cache):
    for name in ("reference", "data"):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "blue" / "03.png").write_bytes(b"no image")
    out = tmp_path / "s.parquet"
    words = [
        "--reference",
        str(tmp_path / "reference"),
        "--data",
        str(tmp_path / "data"),
        "--normal",
        "blue",
        "--out",
        str(out),
    ]
    status, text, errors = command(
        monkeypatch, capsys, "surprise", str(trained), *words, "--draw", str(tmp_path / "s.png")
    )
    assert status == 0, errors
    assert "39 images scored" in text
    assert "1 left out, which cannot be read, the first is blue/03.png" in text
    assert Image.open(tmp_path / "s.png").text["openjepa"].startswith("openjepa surprise")
    table = pq.read_table(out)
    assert 3 not in table["id"].to_pylist()
    assert table["path"].to_pylist()[3] == "blue/04.png"
    assert table["label"].to_pylist() == 19 * ["blue"] + 20 * ["red"]
    assert table["odd"].to_pylist() == 19 * [False] + 20 * [True]


def test_it_is_told_how_far_it_is(monkeypatch, capsys, tmp_path, trained, folder, cache):
    monkeypatch.setattr("openjepa.recipes.oddity.EVERY", 0.0)
    words = ["--reference", str(folder), "--data", str(folder), "--out", str(tmp_path / "s.parquet")]
    status, text, _ = command(monkeypatch, capsys, "surprise", str(trained), *words)
    assert status == 0
    assert text.splitlines()[:3] == ["16 of 40 images", "32 of 40 images", "40 of 40 images"]


def test_nothing_but_scores_is_written_over(monkeypatch, capsys, tmp_path, trained, folder, cache):
    words = ["surprise", str(trained), "--reference", str(folder), "--data", str(folder)]
    out, photo = tmp_path / "s.parquet", tmp_path / "photo.png"
    Image.new("RGB", (20, 20)).save(photo)
    assert command(monkeypatch, capsys, *words, "--out", str(out))[0] == 0
    assert command(monkeypatch, capsys, *words, "--out", str(out))[0] == 0  # its own are
    features = tmp_path / "f.parquet"
    pq.write_table(pa.table({"id": [1]}), features)
    before = {file: file.read_bytes() for file in (features, photo)}
    assert "holds no scores" in refused(monkeypatch, capsys, *words, "--out", str(features))
    assert "no picture of openjepa's" in refused(monkeypatch, capsys, *words, "--out", str(out), "--draw", str(photo))
    assert before == {file: file.read_bytes() for file in before}
    for odd in ("s.csv", "s.json", "folder.parquet"):
        (tmp_path / "folder.parquet").mkdir(exist_ok=True)
        assert "of the kind .parquet" in refused(monkeypatch, capsys, *words, "--out", str(tmp_path / odd))


def test_a_grey_reference_is_that_of_its_pixels_in_colour_and_colour_is_unusual_beside_it(
    monkeypatch, capsys, tmp_path, trained, folder, cache
):
    rng = np.random.default_rng(0)
    for kind in ("L", "RGB"):
        (tmp_path / kind).mkdir()
    for i in range(8):
        grey = Image.fromarray(rng.integers(0, 100, (30, 44), dtype=np.uint8))
        for kind in ("L", "RGB"):
            grey.convert(kind).save(tmp_path / kind / f"{i}.png")
    scores = {}
    for reference, data in (("L", "L"), ("RGB", "L"), ("L", str(folder / "red"))):
        out = tmp_path / "s.parquet"
        words = ["--reference", str(tmp_path / reference), "--data", str(tmp_path / data), "--out", str(out)]
        assert command(monkeypatch, capsys, "surprise", str(trained), *words)[0] == 0
        scores[reference, data] = pq.read_table(out)["score"].to_numpy()
    assert (scores["L", "L"] == scores["RGB", "L"]).all()
    assert scores["L", str(folder / "red")].min() > scores["L", "L"].max()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{tmp}/none --reference {folder} --data {folder} --out {tmp}/s.parquet", "is not a run"),
        ("{tmp} --reference {folder} --data {folder} --out {tmp}/s.parquet", "is not a run"),
        ("{run} --reference {tmp}/none --data {folder} --out {tmp}/s.parquet", "no such file or folder"),
        ("{run} --reference {one} --data {folder} --out {tmp}/s.parquet", "a reference of 1 images"),
        ("{run} --reference {folder} --data {small} --out {tmp}/s.parquet", "3x3 pixels are smaller than a patch of 4"),
        ("{run} --reference {folder} --data {folder} --out {tmp}/s.parquet --block 6,10", "does not fit"),
        (
            "{run} --reference {folder} --data {folder} --out {tmp}/s.parquet --block 3",
            "--block 3: give 2 whole numbers",
        ),
        ("{run} --reference {folder} --data {folder} --out {tmp}/s.parquet --stride 9", "leaves gaps"),
        ("{run} --reference {folder} --data {folder} --out {tmp}/s.parquet --task x", "no such labels or masks"),
        ("{run} --reference {folder} --data {folder} --out {tmp}/s.parquet --crop 0", "above 0 and at most 1"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, capsys, tmp_path, trained, folder, cache, words, says):
    for name, size in (("one", 20), ("small", 3)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (size, size)).save(tmp_path / name / "a.png")
    told = words.format(tmp=tmp_path, run=trained, folder=folder, one=tmp_path / "one", small=tmp_path / "small")
    assert says in refused(monkeypatch, capsys, "surprise", *told.split())
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.slow
def test_a_short_run_finds_odd_scenes_better_than_chance_and_than_its_bare_energy(tmp_path, cache):
    """Whitened pixels and random weights find textures nearly as well (docs/looking.md): nothing is claimed of them here."""
    recipe = ijepa_scenes()
    recipe = replace(recipe, schedule=replace(recipe.schedule, epochs=1), precision="fp32")
    pretrain(recipe, "scenes:4000", tmp_path / "run", Console(quiet=True))
    question = Question(
        run=str(tmp_path / "run"),
        reference="scenes:4000-4150",
        data="scenes:5000-5150:odd",
        stride=2,
        out=tmp_path / "s.parquet",
    )
    found = {(r["of"], r["metric"]): r for r in score_images(question, Console(quiet=True))}
    assert found["surprise", "image AUROC"]["interval"][0] > 0.7
    for metric in ("image AUROC", "pixel AUROC", "PRO", "first guess"):
        assert found["surprise", metric]["value"] > found["bare energy", metric]["value"]

"""Claims about evaluation: features kept and never mistaken, answers kept and never stale, mistakes in one line."""

import contextlib
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from openjepa.data.sources import Source, open_source
from openjepa.engine.checkpoint import CHECKSUMS, checkpoints, sha256
from openjepa.errors import UserError
from openjepa.evaluate import features, suite
from openjepa.evaluate.features import EncoderFeatures, Images, PixelFeatures, View, extract, stored
from openjepa.evaluate.subjects import Bench
from openjepa.evaluate.views import ViewFeed
from openjepa.recipes import evaluation
from openjepa.recipes.evaluation import Question
from openjepa.recipes.pretrain import pretrain, random_encoder
from openjepa.recipes.recipe import override
from tests.conftest import recipe_of
from tests.helpers import refused

QUIET = Console(quiet=True)
VIEW = View((32, 32))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def extractor(recipe, view: View = VIEW, layers: int = 2) -> EncoderFeatures:
    return EncoderFeatures(random_encoder(recipe), view, contextlib.nullcontext, "fp32", layers)


def bench(train: Source, test: Source, **more: object) -> Bench:
    return Bench(train, test, VIEW, 4, torch.device("cpu"), "fp32", contextlib.nullcontext, **more)


def answers(encoders: dict, on: Bench, asked: list, console: Console = QUIET) -> list[dict]:
    return list(chain.from_iterable(suite.evaluate(encoders, on, asked, [], console)))


SHORT = {"linear.epochs": "2", "linear.min_steps": "40"}


# ---------------------------------------------------------------- features


def test_features_are_pooled_normed_layers(tiny, folder):
    encoder, source = random_encoder(tiny), open_source(str(folder))
    images = Images(source, range(6), VIEW)
    found = extract(extractor(tiny), images)
    assert found.shape == (6, 2, 24)
    whole = torch.stack([images[i] for i in range(6)])
    assert torch.allclose(found[:, -1], encoder(whole).mean(1), atol=1e-5)
    assert torch.allclose(found.flatten(1), encoder.features(whole, layers=2), atol=1e-5)
    assert extract(PixelFeatures(VIEW), images).shape == (6, 1, 3 * 32 * 32)
    big = torch.full((1, 3, 128, 256), 51, dtype=torch.uint8)
    assert PixelFeatures(View((128, 256)))(big).shape == (1, 1, 3 * 32 * 64)
    assert torch.allclose(PixelFeatures(View((128, 256)))(big), torch.tensor(0.2))


def test_views_crop_or_squash():
    assert View((224, 224)).box(640, 480) == (80, 0, 560, 480)
    assert View((224, 224), share=0.875).box(480, 480) == (30, 30, 450, 450)
    assert View((224, 224), squash=True).box(640, 480) == (0, 0, 640, 480)
    with pytest.raises(UserError, match=r"--crop 1\.5"):
        View((224, 224), share=1.5)


def test_stored_features_are_those_extracted_and_read_not_made_again(tiny, folder, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 16)
    source = open_source(str(folder))
    make = extractor(tiny)
    first = stored(make, source, "a")
    assert torch.equal(first.rows(slice(None)), extract(make, Images(source, range(40), VIEW)))
    monkeypatch.setattr(EncoderFeatures, "__call__", lambda *_: pytest.fail("made again"))
    again = stored(make, source, "a")
    assert np.array_equal(first.values, again.values)
    assert np.array_equal(first.hashes, again.hashes)
    assert len(set(first.hashes.tolist())) == 40


def test_a_killed_extraction_goes_on_where_it_was(tiny, folder, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 8)
    source, make, seen = open_source(str(folder)), extractor(tiny), []
    whole = features.fill

    def dies(store, block, *rest):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(block)
        whole(store, block, *rest)

    monkeypatch.setattr(features, "fill", dies)
    with pytest.raises(KeyboardInterrupt):
        stored(make, source, "a")
    monkeypatch.setattr(features, "fill", lambda store, block, *rest: (seen.append(block), whole(store, block, *rest)))
    found = stored(make, source, "a")
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(found.rows(slice(None)), extract(make, Images(source, range(40), VIEW)))


def test_two_processes_share_the_work(tiny, folder, monkeypatch):
    """While one fills its blocks another comes and fills the rest: each block is made once, and both read all of them."""
    monkeypatch.setattr(features, "BLOCK", 8)
    source, make, seen = open_source(str(folder)), extractor(tiny), []
    whole = features.fill

    def other(store, block, *rest):
        monkeypatch.setattr(features, "fill", whole)
        seen.append(block)
        whole(store, block, *rest)
        monkeypatch.setattr(features, "fill", lambda s, b, *r: (seen.append(b), whole(s, b, *r)))
        stored(make, source, "a", share=(1, 2))

    monkeypatch.setattr(features, "fill", other)
    found = stored(make, source, "a", share=(0, 2))
    assert seen[:4] == [0, 2, 3, 4]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert torch.equal(found.rows(slice(None)), extract(make, Images(source, range(40), VIEW)))


def test_what_features_depend_on_is_in_their_name(tiny, folder):
    plain = extractor(tiny).identity
    assert plain == extractor(tiny).identity
    for other in (
        extractor(replace(tiny, seed=1)),
        extractor(tiny, layers=1),
        extractor(tiny, View((32, 32), share=0.9)),
        extractor(tiny, View((32, 32), squash=True)),
        extractor(replace(tiny, data=replace(tiny.data, mean=(0.1, 0.2, 0.3)))),
    ):
        assert features.short_hash(other.identity) != features.short_hash(plain)
    resized = extractor(replace(tiny, model=replace(tiny.model, image_size=(64, 64))))
    resized.encoder = resized.encoder.resized((32, 32))
    resized.view = VIEW
    assert resized.identity["weights"] != plain["weights"]  # its positions were interpolated


def test_features_that_are_not_finite_are_named(tiny, folder):
    make = extractor(tiny)
    with torch.no_grad():
        make.encoder.vit.norm.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"features of blue/00\.png are not finite"):
        stored(make, open_source(str(folder)), "a")


@pytest.mark.parametrize("kind", ["crop", "squash"])
def test_augmented_views_are_drawn_anew_each_epoch_and_the_same_each_run(tiny, folder, kind):
    source = open_source(str(folder))
    labels = torch.from_numpy(source.labels["label"])
    feed = ViewFeed(extractor(tiny), source, np.arange(40), labels, kind, seed=0, workers=0)
    assert (feed.width("last"), feed.width("concat4")) == (24, 48)
    (first, first_labels), *more = list(feed.batches(0, 16))
    assert len(more) == 1
    (again, again_labels), _ = feed.batches(0, 16)
    assert torch.equal(first["concat4"], again["concat4"])
    assert torch.equal(first_labels, again_labels)
    views = [features_of(feed, epoch) for epoch in (0, 1)]
    assert not torch.allclose(*views, atol=1e-4)


def features_of(feed: ViewFeed, epoch: int) -> torch.Tensor:
    """In the order of the images' labels and features' sums, whatever the epoch's."""
    parts = torch.cat([batch["last"] for batch, _ in feed.batches(epoch, 20)])
    return parts[parts.sum(1).argsort()]


# ---------------------------------------------------------------- questions and answers


class Renamed(Source):
    """The folder's images under other class names or labels."""

    def __init__(self, base: Source, classes: list[str] | None = None, labels: np.ndarray | None = None) -> None:
        self.base = base
        self.classes = {"label": classes} if classes else {}
        self.labels = {"label": labels if labels is not None else base.labels["label"]} if classes else {}

    def __len__(self):
        return len(self.base)

    def read(self, index):
        return self.base.read(index)

    def name(self, index):
        return self.base.name(index)


def test_the_suite_scores_encoders_beside_raw_pixels(tiny, folder, capsys):
    source = open_source(str(folder))
    encoders = {"pretrained": random_encoder(tiny)}
    asked = evaluation.asked(["knn", "linear"], SHORT)
    results = answers(encoders, bench(source, source), asked, Console())
    assert {(r["protocol"], r["of"]) for r in results} == {
        (p, o) for p in ("knn", "linear") for o in ("pretrained", "raw pixels")
    }
    # blue and red images: raw pixels tell them apart
    linear = next(r for r in results if (r["protocol"], r["of"]) == ("linear", "raw pixels"))
    assert linear["value"] == 1.0
    assert linear["details"]["confusion"] == [[0, 0, 20], [1, 1, 20]]
    assert linear["images"]["shared"] == 40
    assert "40 test images are in the training set" in capsys.readouterr().out
    reordered = Renamed(source, ["red", "blue"], 1 - source.labels["label"])
    again = answers(encoders, bench(source, reordered), asked[:1])
    assert [r["value"] for r in again] == [r["value"] for r in results if r["protocol"] == "knn"]


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run that evaluation may write to, of an encoder that takes 24x40 pixels."""
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "run"))


def ask(run: Path, folder: Path, values: dict[str, str] = SHORT, **more: object) -> list[dict]:
    question = Question(source=str(run), train=str(folder), test=str(folder), **more)
    file = evaluation.evaluate(question, values, Console())
    return json.loads(file.read_text())["results"]


def test_answers_are_read_again_unless_asked_afresh(run, folder, capsys, monkeypatch):
    first = ask(run, folder)
    assert len(first) == 6
    assert {r["of"] for r in first} == {"pretrained", "random weights", "raw pixels"}
    assert all(r["network"] == "target_encoder" and r["interval"][0] <= r["value"] <= r["interval"][1] for r in first)
    capsys.readouterr()
    again = ask(run, folder)
    assert "6 answers were there already" in capsys.readouterr().out
    assert [(r["seconds"], r["value"]) for r in again] == [(r["seconds"], r["value"]) for r in first]
    called = []
    monkeypatch.setattr(features, "fill", lambda *_: called.append(1))
    ask(run, folder, fresh=True)
    assert called


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_compiled_encoders_answer_the_same(run, folder, monkeypatch, tmp_path, precision, near):
    def kept(**more: object) -> list[np.ndarray]:
        monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / str(more)))
        results = ask(run, folder, {}, protocols=["knn"], precision=precision, fresh=True, **more)
        assert {r["value"] for r in results if r["of"] == "raw pixels"} == {1.0}
        return [np.load(file) for file in sorted((tmp_path / str(more)).rglob("values.npy"))]

    plain = kept()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.reset()
    compiled = kept(compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of blocks that are alike, at any batch size
    assert len(plain) == len(compiled) > 2
    assert all(np.allclose(*pair, atol=near) for pair in zip(plain, compiled, strict=True))


def test_class_tokens_are_asked_in_the_patches_place(folder, run, tmp_path, monkeypatch, capsys):
    recipe = override(recipe_of("mae"), {"model.registers": "1", "model.image_size": "32"})  # which comes after it
    encoder, source = random_encoder(recipe), open_source(str(folder))
    whole = torch.stack([Images(source, range(3), VIEW)[i] for i in range(3)])
    found = EncoderFeatures(encoder, VIEW, contextlib.nullcontext, "fp32", 2, "class")(whole)
    first = encoder.vit.tokens(encoder.normalise(whole))[:, 0]
    assert torch.allclose(found[:, -1], first, atol=1e-5)
    assert torch.allclose(encoder.features(whole, layers=2, pool="class"), found.flatten(1), atol=1e-5)
    patches = EncoderFeatures(encoder, VIEW, contextlib.nullcontext, "fp32", 2)
    assert patches.identity != EncoderFeatures(encoder, VIEW, contextlib.nullcontext, "fp32", 2, "class").identity
    pretrain(recipe, str(folder), tmp_path / "mae", QUIET)
    of_patches, of_class = (
        ask(tmp_path / "mae", folder, {}, protocols=["knn"], tokens=t) for t in ("patches", "class")
    )
    assert [r["tokens"] for r in of_class if r["of"] == "pretrained"] == ["patches", "class"]
    assert len(of_class) == 2 * len(of_patches) - 1  # both stay; of raw pixels it is one question
    words = ["evaluate", str(run), "--train", str(folder), "--test", str(folder), "--tokens", "class"]
    assert "has no class token" in refused(monkeypatch, capsys, *words)
    with pytest.raises(ValueError, match="no class token"):
        random_encoder(recipe_of("ijepa")).features(whole, pool="class")


def test_to_compile_needs_a_compiler(run, folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    images, out = str(folder), str(run.parent / "out")
    for words in (
        f"evaluate {run} --train {images} --test {images} --compile",
        f"embed {run} --data {images} --out {out}.parquet --compile",
        f"pretrain --recipe ijepa_scenes --data {images} --out {out} --machine.compile true",
    ):
        assert "needs a C++ compiler (g++" in refused(monkeypatch, capsys, *words.split())
    assert {path.name for path in run.parent.iterdir()} <= {"run", "cache"}


def test_another_question_is_asked_and_both_answers_stay(run, folder, tmp_path):
    ask(run, folder, {}, protocols=["knn"])
    changed = ask(run, folder, {"knn.ks": "5"}, protocols=["knn"])
    assert [r["details"]["k"] for r in changed] == [20] * 3 + [5] * 3
    both = ask(run, folder, {}, protocols=["knn"], network="encoder")
    assert {r["network"] for r in both} == {"encoder", "target_encoder"}
    assert len(both) == 9


def test_another_checkpoint_at_the_same_path_is_another_question(run, folder, capsys):
    from safetensors.torch import load_file, save_file

    first = {r["of"]: r for r in ask(run, folder, {}, protocols=["knn"])}
    newest = checkpoints(run)[-1].path
    weights = load_file(newest / "weights.safetensors")
    weights["target_encoder.norm.weight"] *= -torch.arange(24)
    was = sha256(newest / "weights.safetensors")
    save_file(weights, newest / "weights.safetensors")
    sums = (newest / CHECKSUMS).read_text()
    (newest / CHECKSUMS).write_text(sums.replace(was, sha256(newest / "weights.safetensors")))
    capsys.readouterr()
    second = {r["of"]: r for r in ask(run, folder, {}, protocols=["knn"])}
    assert "2 answers were there" in capsys.readouterr().out  # the controls'
    assert second["pretrained"]["question"] != first["pretrained"]["question"]
    assert len(json.loads((run / "evaluation.json").read_text())["results"]) == 4


def test_an_exported_file_is_evaluated_like_its_run(run, folder, tmp_path):
    from openjepa.recipes.exchange import export

    export(str(run), "safetensors", tmp_path / "out")
    with pytest.raises(UserError, match="--out DIR"):
        ask(tmp_path / "out", folder, {}, protocols=["knn"])
    found = ask(tmp_path / "out", folder, {}, protocols=["knn"], out=tmp_path / "scores")
    own = ask(run, folder, {}, protocols=["knn"])
    of = "pretrained"
    assert [r["value"] for r in found if r["of"] == of] == [r["value"] for r in own if r["of"] == of]


def test_other_sizes_and_views_change_the_answer_s_name(run, folder):
    names = set()
    for more in ({}, {"image_size": (32, 32)}, {"share": 0.5}, {"squash": True}):
        results = ask(run, folder, {}, protocols=["knn"], **more)
        names |= {r["question"] for r in results if r["of"] == "pretrained"}
    assert len(names) == 4


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("classes", "says"),
    [(["blue", "green"], "such as 'green'"), (None, "needs labels"), (["blue"], "'blue' is the only one")],
)
def test_labels_that_do_not_fit_are_refused(tiny, folder, classes, says):
    source = open_source(str(folder))
    one = np.zeros(40, dtype=np.int64) if classes == ["blue"] else None
    other = Renamed(source, classes, one)
    train = other if classes == ["blue"] else source
    with pytest.raises(UserError, match=says):
        answers({"x": random_encoder(tiny)}, bench(train, other), evaluation.asked(["knn"], {}))


@pytest.mark.parametrize(
    ("names", "values", "says"),
    [
        (["knnn"], {}, "did you mean 'knn'"),
        (["knn"], {"linear.epochs": "3"}, "belongs to none of the protocols"),
        (["linear:mae"], {"linear.epoch": "3"}, "did you mean 'linear.epochs'"),
        (["linear"], {"linear.epochs": "many"}, "linear.epochs is 'many'"),
        (["knn"], {"knn.ks": "0"}, "ks are 1 or more"),
    ],
)
def test_protocols_that_are_not_there_are_refused(names, values, says):
    with pytest.raises(UserError, match=says):
        evaluation.asked(names, values)


def test_fewer_images_than_neighbours(tiny, folder):
    source = open_source(str(folder))
    asked = evaluation.asked(["knn"], {"knn.ks": "50,100"})
    with pytest.raises(UserError, match="k 50 needs as many training images: there are 40"):
        answers({"x": random_encoder(tiny)}, bench(source, source), asked)


def test_the_command_line_says_mistakes_in_one_line(run, folder, monkeypatch, capsys):
    for words, says in (
        (["--crop", "3"], "--crop 3.0"),
        (["--image-size", "30,30"], "does not divide the image of 30x30"),
        (["--knn.k", "3"], "did you mean"),
        (["--protocols", "knn,"], "unknown protocol ''"),
        (["--test", "nowhere"], "no such file"),
    ):
        argv = ["evaluate", str(run), "--train", str(folder), "--test", str(folder), "--protocols", "knn"]
        assert says in refused(monkeypatch, capsys, *argv, *words)


def test_a_damaged_file_of_answers_is_named(run, folder):
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json cannot be read"):
        ask(run, folder, {}, protocols=["knn"])

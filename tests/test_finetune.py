"""Claims about learning from labels with the whole network, and from few of them."""

import contextlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.data.mixup import Mixup
from timm.optim import param_groups_layer_decay

import openjepa
from openjepa.data.sources import Source, open_source
from openjepa.errors import UserError
from openjepa.evaluate import finetune as method
from openjepa.evaluate import lowshot
from openjepa.evaluate.features import Features, Images, View
from openjepa.evaluate.finetune import Classifier, Distorted, FinetuneConfig, layer_groups
from openjepa.evaluate.lowshot import LowShotConfig
from openjepa.models.vit import ViT, ViTConfig
from openjepa.recipes.pretrain import random_encoder
from tests.helpers import command, images, refused, same

VIEW = View((32, 32))
SHORT = FinetuneConfig(epochs=4, batch_size=8, lr=2e-3, warmup_epochs=1)


def tuned(config: FinetuneConfig, tiny, folder: Path, seed: int = 0) -> tuple[Classifier, float]:
    """The classifier of red and blue, and its accuracy on the images that it learned from."""
    source, encoder = open_source(str(folder)), random_encoder(tiny)
    labels, rows = torch.from_numpy(source.labels["label"]), np.arange(40)
    model = method.finetune(config, encoder, source, rows, labels, 2, VIEW, contextlib.nullcontext, seed)
    found = method.classify(model, encoder, Images(source, rows, VIEW), contextlib.nullcontext)
    return model, float((found == labels).float().mean())


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.25},
        {"ema": 0.8},
        {"erase": 0.25, "randaug": "", "clip_norm": 1.0},
    ],
)
def test_fine_tuning_learns_and_is_a_function_of_its_seed(tiny, folder, more):
    config = replace(SHORT, **more)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    model, accuracy = tuned(config, tiny, folder)
    assert accuracy > 0.9
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    random.seed(99)  # what others draw changes nothing
    torch.manual_seed(99)
    assert same(tuned(config, tiny, folder)[0].state_dict(), model.state_dict())
    assert not same(tuned(config, tiny, folder, seed=1)[0].state_dict(), model.state_dict())
    assert not model.training


def test_the_encoder_that_is_tuned_stays_as_it_was(tiny, folder):
    source, encoder = open_source(str(folder)), random_encoder(tiny)
    before = {k: v.clone() for k, v in encoder.vit.state_dict().items()}
    labels = torch.from_numpy(source.labels["label"])
    model = method.finetune(SHORT, encoder, source, np.arange(40), labels, 2, VIEW, contextlib.nullcontext, 0)
    assert same(encoder.vit.state_dict(), before)
    assert not torch.equal(model.vit.norm.weight, before["norm.weight"])


def test_layer_decay_is_timms():
    """The same rate and weight decay for every parameter of the same network, but for the final norm: timm counts it to the
    last block, MAE, whose recipe it is, to the head."""
    theirs = timm.create_model(
        "vit_base_patch16_gap_224", depth=3, embed_dim=24, num_heads=2, fc_norm=False, num_classes=5
    )
    scales, decays = {}, {}
    names = {id(p): n for n, p in theirs.named_parameters()}
    for group in param_groups_layer_decay(
        theirs, weight_decay=0.05, layer_decay=0.75, no_weight_decay_list=["pos_embed"]
    ):
        for p in group["params"]:
            scales[names[id(p)]], decays[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    vit = ViT(ViTConfig(size="Ti", image_size=(224, 224), width=24, depth=3, heads=2))
    ours = Classifier(vit, 5)
    own = {id(p): n.removeprefix("vit.") for n, p in ours.named_parameters()}
    seen = set()
    for group in layer_groups(ours, FinetuneConfig()):
        for p in group["params"]:
            name = own[id(p)]
            assert group["lr_scale"] == pytest.approx(1.0 if name.startswith("norm") else scales[name]), name
            assert group["weight_decay"] == decays[name], name
            seen.add(name)
    assert seen == set(scales) - {"pos_embed"}  # fixed here


def test_mixing_is_timms():
    """A step's images and targets are what timm's Mixup makes of them with the same random numbers."""
    x, y = images(8, 16, 16), torch.arange(8) % 3
    found = []
    for _ in range(2):
        with method.seeded(5):
            found.append(Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=3)(x.clone(), y))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.allclose(found[0][1].sum(1), torch.ones(8))


def test_each_image_is_distorted_by_its_own_numbers(tiny, folder):
    source, encoder = open_source(str(folder)), random_encoder(tiny)
    both = Distorted(source, np.array([3, 7]), VIEW, SHORT, encoder, seed=0, epoch=2)
    alone = Distorted(source, np.array([7]), VIEW, SHORT, encoder, seed=0, epoch=2)
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(both[1], Distorted(source, np.array([7]), VIEW, SHORT, encoder, seed=0, epoch=3)[0])
    assert both[0].shape == (3, 32, 32)


def test_rates_rise_and_fall():
    found = [method.rate(step, 20, 4, 1.0, 0.1) for step in range(20)]
    assert found[:5] == [0, 0.25, 0.5, 0.75, 1.0]
    assert found[12] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1, abs=0.01)


def test_divergence_is_said(tiny, folder):
    with pytest.raises(UserError, match=r"diverged in epoch 1 .*lower its lr"):
        tuned(replace(SHORT, lr=1e30, warmup_epochs=0), tiny, folder)


@pytest.mark.parametrize(
    "values", [{"epochs": 0}, {"layer_decay": 0.0}, {"drop_path": 1.0}, {"mixup": -1.0}, {"ema": 1.0}]
)
def test_impossible_values_are_refused(values):
    with pytest.raises(UserError, match="finetune: "):
        FinetuneConfig(**values)


def test_recipes_are_the_papers():
    low, full, mae = (method.RECIPES[name] for name in ("low_shot", "full", "mae"))
    assert (low.epochs, low.batch_size, low.lr, low.layer_decay, low.mixup, low.drop_path) == (
        50,
        512,
        3e-5,
        0.75,
        0,
        0,
    )
    assert (full.batch_size, full.lr, full.mixup, full.cutmix, full.drop_path, full.weight_decay) == (
        528, 1e-4, 0.8, 1.0, 0.25, 0.04)  # fmt: skip
    assert (mae.epochs, mae.layer_decay, mae.erase, mae.per_256) == (100, 0.65, 0.25, True)


# ---------------------------------------------------------------- the command


def test_a_classifier_is_kept_and_loads(trained, folder, tmp_path, monkeypatch, capsys):
    words = ["finetune", str(trained), "--train", str(folder), "--test", str(folder), "--out", str(tmp_path / "c")]
    short = [
        "--finetune.epochs",
        "4",
        "--finetune.batch_size",
        "8",
        "--finetune.lr",
        "2e-3",
        "--finetune.warmup_epochs",
        "1",
    ]
    status, text, errors = command(monkeypatch, capsys, *words, *short)
    assert status == 0, errors
    assert "epoch 4/4" in text
    assert "40 test images are in the training set" in text
    (record,) = json.loads((tmp_path / "c" / "evaluation.json").read_text())["results"]
    assert record["protocol"] == "finetune:low_shot"
    found = openjepa.load(tmp_path / "c")
    assert found.classes == ["blue", "red"]
    assert found.network == "finetuned"
    source = open_source(str(folder))
    pictures = torch.stack([Images(source, [i], View((24, 40)))[0] for i in range(40)])
    share = (found.classify(pictures).argmax(1).numpy() == source.labels["label"]).mean()
    assert share == pytest.approx(record["value"])
    assert share > 0.9
    assert found(pictures).shape == (40, 60, 24)
    status, _, errors = command(monkeypatch, capsys, *words)
    assert status == 2
    assert "not empty" in errors
    file = tmp_path / "c" / "classifier.safetensors"
    state, header = load_file(file), openjepa.convert.formats.read_safetensors(file)[1]
    del state["head.bias"]
    save_file(state, file, dict(header))
    with pytest.raises(UserError, match=r"does not fit this model: missing head\.bias"):
        openjepa.load(tmp_path / "c")
    with pytest.raises(ValueError, match="has no head"):
        openjepa.load(trained).classify(pictures)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--recipe", "ful"], "did you mean 'full'"),
        (["--finetune.epoch", "3"], "did you mean 'finetune.epochs'"),
        (["--lr", "3"], "unknown option --lr"),
        (["--task", "colour"], "no task 'colour'"),
        (["--train", "scenes:20", "--test", "scenes:20-40"], "which labels? --task, one of count, distance"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(trained, folder, tmp_path, monkeypatch, capsys, words, says):
    given = ["--train", str(folder), "--test", str(folder), "--out", str(tmp_path / "c")]
    assert says in refused(monkeypatch, capsys, "finetune", str(trained), *given, *words)
    assert not (tmp_path / "c").exists()


# ---------------------------------------------------------------- few labels


def test_a_share_of_every_class_is_drawn():
    labels = np.array([0] * 200 + [1] * 100 + [2] * 10)
    rows = lowshot.drawn(LowShotConfig(share=0.05), labels, seed=0, draw=0)
    assert np.bincount(labels[rows]).tolist() == [10, 5, 1]
    assert np.bincount(labels[lowshot.drawn(LowShotConfig(share=0.001), labels, 0, 0)]).tolist() == [1, 1, 1]
    assert np.bincount(labels[lowshot.drawn(LowShotConfig(per_class=7), labels, 0, 0)]).tolist() == [7, 7, 7]
    several = [lowshot.drawn(LowShotConfig(), labels, 0, draw).tolist() for draw in range(3)]
    assert several[0] != several[1] != several[2]
    assert several[0] == lowshot.drawn(LowShotConfig(), labels, 0, 0).tolist()


def test_lists_of_files_say_which_images(folder, tmp_path):
    source: Source = open_source(str(folder))
    labels = torch.from_numpy(source.labels["label"])
    (tmp_path / "1.txt").write_text("blue/03.png\nred/17.png\n\n")
    config = LowShotConfig(lists=(str(tmp_path / "1.txt"),))
    (rows,) = lowshot.draws(config, source, labels, 0)
    assert [source.name(i) for i in rows] == ["blue/03.png", "red/17.png"]
    (tmp_path / "1.txt").write_text("blue/03.png\nn01440764_10026.JPEG\n")
    with pytest.raises(UserError, match=r"1 of 2 images are not in --train, as 'n01440764_10026\.JPEG'"):
        lowshot.draws(config, source, labels, 0)
    with pytest.raises(UserError, match="No such file"):
        lowshot.draws(LowShotConfig(lists=(str(tmp_path / "2.txt"),)), source, labels, 0)


def test_simclrs_lists_name_files_without_their_folders(tmp_path):
    """Names that are unique in the set, as ImageNet's are; where they are not, a list must give folders, too."""
    for name in ("n01", "n02"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            openjepa_image(tmp_path / "set" / name / f"{name}_{i}.JPEG")
    source = open_source(str(tmp_path / "set"))
    labels = torch.from_numpy(source.labels["label"])
    (tmp_path / "1.txt").write_text("n01_1.JPEG\nn02_0.JPEG\n")
    (rows,) = lowshot.draws(LowShotConfig(lists=(str(tmp_path / "1.txt"),)), source, labels, 0)
    assert [source.name(i) for i in rows] == ["n01/n01_1.JPEG", "n02/n02_0.JPEG"]


def openjepa_image(file: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(file)


def held(seed: int, count: int) -> tuple[Features, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.random.default_rng(9).normal(size=(3, 2, 10))
    values = (centres[labels] + rng.normal(size=(count, 2, 10))).astype(np.float32)
    return Features(values, np.arange(count)), torch.from_numpy(labels)


@pytest.mark.parametrize("rows", [np.arange(0, 300, 5), np.arange(0, 300, 40)], ids=["many", "fewer than dimensions"])
def test_the_regression_is_scikit_learns(rows):
    (train, y), (test, _) = held(0, 300), held(1, 100)
    config = LowShotConfig(features=("last",), cs=(0.1,))
    found, about = lowshot.logistic(config, train, y, rows, test)
    scaler = StandardScaler().fit(train.values[rows, -1])
    library = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(train.values[rows, -1]), y[rows])
    assert (found.numpy() == library.predict(scaler.transform(test.values[:, -1]))).all()
    assert about["c"] == 0.1
    both = lowshot.logistic(LowShotConfig(), train, y, rows, test)[1]
    assert both["features"] in ("last", "concat4")
    assert 0 < both["validation_accuracy"] <= 1
    one_each = np.array([int((y == c).nonzero()[0]) for c in range(3)])
    assert lowshot.logistic(LowShotConfig(), train, y, one_each, test)[1]["validation_accuracy"] is None


def test_one_class_alone_is_refused(folder):
    train, _ = held(0, 30)
    with pytest.raises(UserError, match="one class"):
        lowshot.logistic(LowShotConfig(), train, torch.zeros(30, dtype=torch.int64), np.arange(10), train)


def test_tuning_and_regression_are_both_kept(trained, folder, tmp_path):
    from openjepa.recipes.evaluation import Question, evaluate

    values = {"lowshot.per_class": "4", "lowshot.draws": "2", "lowshot.finetune.epochs": "2", "lowshot.folds": "2"}
    question = Question(
        source=str(trained), train=str(folder), test=str(folder), protocols=["lowshot:paper"], out=tmp_path / "o"
    )
    file = evaluate(question, values, Console(quiet=True))
    records = {r["of"]: r for r in json.loads(file.read_text())["results"]}
    details = records["pretrained"]["details"]
    assert set(details["methods"]) == {"linear", "finetune"}
    assert details["labels"] == 8
    assert all(len(m["draws"]) == 2 for m in details["methods"].values())
    assert records["pretrained"]["value"] == max(m["accuracy"] for m in details["methods"].values())
    assert set(records["raw pixels"]["details"]["methods"]) == {"linear"}

"""Claims about data sets by name and suites of them: where they are looked for, what is skipped and why, what is kept."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from openjepa.data.sources import open_source
from openjepa.errors import UserError
from openjepa.evaluate import answers, features, protocols
from openjepa.evaluate.protocols import PROTOCOLS
from openjepa.recipes import evaluation, suites
from openjepa.recipes.evaluation import Question
from openjepa.recipes.suites import SETS, SUITES, find
from tests.helpers import refused

QUICK = {
    "linear.epochs": "1",
    "linear.batch_size": "8",
    "lowshot.per_class": "4",
    "lowshot.draws": "2",
    "lowshot.finetune.epochs": "1",
    "lowshot.finetune.batch_size": "4",
    "finetune.epochs": "1",
    "finetune.batch_size": "8",
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def root(folder, tmp_path) -> Path:
    """Two of the paper's sets, tiny."""
    for name, test in (("ILSVRC2012", "val"), ("cifar100", "test")):
        (tmp_path / "sets" / name).mkdir(parents=True)
        for part in ("train", test):
            os.symlink(folder, tmp_path / "sets" / name / part)
    return tmp_path / "sets"


def asked(run: Path, values: dict[str, str], **more: object) -> dict:
    file = evaluation.evaluate(Question(source=str(run), **more), values, Console())
    return json.loads(file.read_text())


# ---------------------------------------------------------------- by name


def test_a_set_is_taken_from_the_root_whatever_holds_it(tmp_path):
    for files, train, test in (
        (("train/a/1.png", "val/a/1.png"), "train", "val"),
        (("train.parquet", "test.parquet"), "train.parquet", "test.parquet"),
        (("train-0.tar", "train-1.tar", "validation.tar"), "train-*.tar", "validation.tar"),
    ):
        root = tmp_path / test
        for file in files:
            (root / "food101" / file).parent.mkdir(parents=True, exist_ok=True)
            (root / "food101" / file).touch()
        found = find("food101", root)
        assert (found.train, found.test) == (str(root / "food101" / train), str(root / "food101" / test))
        assert found.share == 0.875


def test_a_set_that_the_root_lacks_is_torchvisions_or_said_to_be_nowhere(tmp_path):
    assert find("cifar100", tmp_path).train == "torchvision:CIFAR100:train"
    with pytest.raises(UserError, match="DIR/places205/train"):
        find("places205", None)
    with pytest.raises(UserError, match="did you mean 'food101'"):
        find("food10", tmp_path)
    (tmp_path / "mine" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="has no part val or validation or valid or test"):
        find("mine", tmp_path)
    (tmp_path / "mine" / "test").mkdir()
    assert find("mine", tmp_path).share == 1.0  # nobody's protocol


def test_clevr_is_scenes_until_it_is_there(tmp_path):
    assert find("clevr", tmp_path).train.startswith("scenes:")
    (tmp_path / "CLEVR_v1.0").mkdir()
    assert find("clevr", tmp_path).test == f"clevr:{tmp_path / 'CLEVR_v1.0'}:val"


def test_torchvisions_names_are_torchvisions():
    from torchvision import datasets

    for entry in SETS.values():
        for spec in (entry.train, entry.test):
            kind, _, rest = spec.partition(":")
            if kind == "torchvision":
                assert hasattr(datasets, rest.partition(":")[0])
        assert entry.protocol in PROTOCOLS


# ---------------------------------------------------------------- suites


def test_the_paper_has_its_tables():
    rows = SUITES["paper"]
    assert {row.table for row in rows} == {"table 1", "table 2", "tables 3 and 5", "tables 4 and 5", "table 15"}
    assert {row.data for row in rows} == {"imagenet", "cifar100", "places205", "inat18", "clevr"}
    assert all(name in PROTOCOLS for suite in SUITES.values() for row in suite for name in row.protocols)


def test_the_paper_is_asked_as_far_as_the_data_goes_and_the_rest_is_named(run, root, monkeypatch, capsys):
    monkeypatch.setattr(suites, "SCENES", ("scenes:40", "scenes:40-60"))
    found = asked(run, QUICK, suite="paper", root=root, image_size=(16, 16))
    results = found["results"]
    assert Counter((r["table"], r["task"], r["protocol"]) for r in results) == {
        ("table 1", "label", "linear:imagenet"): 3,
        ("table 2", "label", "lowshot:paper"): 3,
        ("tables 3 and 5", "label", "linear:transfer"): 3,
        ("tables 4 and 5, scenes, in place of clevr", "count", "linear:clevr_count"): 3,
        ("tables 4 and 5, scenes, in place of clevr", "distance", "linear:clevr_dist"): 3,
        ("table 15", "label", "finetune:full"): 2,
    }
    assert set(found["skipped"]) == {"places205: linear:places205", "inat18: linear:inat18"}
    assert "skipped places205" in capsys.readouterr().out
    low = next(r for r in results if r["protocol"] == "lowshot:paper" and r["of"] == "pretrained")
    assert set(low["details"]["methods"]) == {"linear", "finetune"}
    assert low["value"] == max(m["accuracy"] for m in low["details"]["methods"].values())
    assert all(r["view"]["share"] == 0.875 for r in results if r["task"] == "label")  # resize 256, crop 224
    asked(run, QUICK, suite="paper", root=root, image_size=(16, 16))
    assert capsys.readouterr().out.count("answers were there already") == 6


def test_values_may_be_of_rows_that_the_data_does_not_reach(run, root, monkeypatch):
    monkeypatch.setattr(suites, "SCENES", ("scenes:40", "scenes:40-60"))
    shutil.rmtree(root / "ILSVRC2012")
    found = asked(run, QUICK, suite="paper", root=root, image_size=(16, 16))
    assert "imagenet: finetune:full" in found["skipped"]
    with pytest.raises(UserError, match=r"--dense\.epochs belongs to none"):
        asked(run, {"dense.epochs": "1"}, suite="paper", root=root)


def test_what_fails_in_a_suite_is_said_and_the_others_go_on(run, root, folder, monkeypatch):
    monkeypatch.setitem(
        suites.SUITES, "two", [suites.Row("", "broken", ("knn",)), suites.Row("", "cifar100", ("knn",))]
    )
    (root / "broken" / "train" / "a").mkdir(parents=True)
    os.symlink(folder, root / "broken" / "test")
    found = asked(run, {}, suite="two", root=root)
    assert len(found["results"]) == 3
    assert "no images" in found["skipped"]["broken: knn"]


def test_sets_by_name_are_kept_apart(run, root):
    found = asked(run, {}, sets=["cifar100", "imagenet"], root=root, protocols=["knn"])
    assert [r["test"] for r in found["results"]] == [str(root / "cifar100/test")] * 3 + [
        str(root / "ILSVRC2012/val")
    ] * 3


def test_answers_that_came_before_a_failure_are_kept(run, folder, monkeypatch, capsys):
    def fails(*_: object) -> list:
        raise UserError("it cannot be")

    monkeypatch.setitem(protocols.PROTOCOLS, "linear", replace(PROTOCOLS["linear"], run=fails))
    with pytest.raises(UserError, match="it cannot be"):
        asked(run, {}, train=str(folder), test=str(folder))
    kept = json.loads((run / "evaluation.json").read_text())["results"]
    assert [(r["of"], r["protocol"]) for r in kept] == [("pretrained", "knn")]
    assert "knn" in capsys.readouterr().out


# ---------------------------------------------------------------- tasks, ranks, protocols without a test file of their own


def test_tasks_can_be_chosen(run):
    about = {"train": "scenes:40", "test": "scenes:40-60", "protocols": ["knn"]}
    assert {r["task"] for r in asked(run, {}, **about, tasks=["count"])["results"]} == {"count"}
    with pytest.raises(UserError, match="did you mean 'count'"):
        asked(run, {}, **about, tasks=["counts"])


def test_ranks_beyond_the_first_make_their_share_of_features_and_no_answers(run, folder, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    made = []
    whole = features.fill
    monkeypatch.setattr(features, "fill", lambda store, block, *rest: (made.append(block), whole(store, block, *rest)))
    file = evaluation.evaluate(Question(source=str(run), train=str(folder), test=str(folder)), {}, Console())
    assert not file.exists()
    assert made == [2, 3, 4, 0, 1] * 3  # its own share first; both encoders and the pixels, one set of images
    monkeypatch.setenv("RANK", "0")
    made.clear()
    evaluation.evaluate(
        Question(source=str(run), train=str(folder), test=str(folder), protocols=["knn"]), {}, Console()
    )
    assert file.exists()
    assert made == []


def test_an_image_that_changed_is_another_question(run, tmp_path, folder):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    first = asked(run, {}, train=str(data), test=str(data), protocols=["knn"])["results"]
    file = next((data / "red").iterdir())
    shutil.copy(file, tmp_path / "kept")
    with file.open("ab") as handle:
        handle.write(b"more")
    second = asked(run, {}, train=str(data), test=str(data), protocols=["knn"])["results"]
    assert len({r["question"] for r in second}) == 6  # the old answers stay
    assert second[:3] == first


def test_renamed_classes_are_another_question(run, tmp_path, folder):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    asked(run, {}, train=str(data), test=str(data), protocols=["knn"])
    (data / "red").rename(data / "green")
    with pytest.raises(UserError, match="training set lacks, such as 'green'"):
        asked(run, {}, train=str(folder), test=str(data), protocols=["knn"])
    again = asked(run, {}, train=str(data), test=str(data), protocols=["knn"])["results"]
    assert len({r["question"] for r in again}) == 6


def test_a_list_that_changed_is_another_question(run, tmp_path, folder):
    names = [f"{c}/{i:02}.png" for c in ("blue", "red") for i in range(5)]
    about = {"train": str(folder), "test": str(folder), "protocols": ["lowshot:1%"]}
    values = {"lowshot.lists": str(tmp_path / "list.txt")}
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert asked(run, values, **about)["results"][0]["details"]["labels"] == 10
    (tmp_path / "list.txt").write_text("\n".join(names[1:]))
    assert asked(run, values, **about)["results"][-1]["details"]["labels"] == 9


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x80"])
def test_lists_that_cannot_be_used_are_refused(run, tmp_path, folder, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt (names no image|is not text)"):
        asked(run, {"lowshot.lists": str(tmp_path / "list.txt")}, train=str(folder), test=str(folder),
              protocols=["lowshot:1%"])  # fmt: skip


@pytest.mark.parametrize(("name", "size"), [("values", 200), ("hashes", 0), ("done", 0)])
def test_a_cut_cache_is_made_again(run, folder, tmp_path, name, size):
    about = {"train": str(folder), "test": str(folder), "protocols": ["knn"]}
    first = asked(run, {}, **about)["results"]
    for file in (tmp_path / "cache" / "features").glob(f"*/{name}.npy"):
        os.truncate(file, size)
    (run / "evaluation.json").unlink()
    again = asked(run, {}, **about)["results"]
    assert [(r["question"], r["value"]) for r in again] == [(r["question"], r["value"]) for r in first]


def test_answers_of_another_process_are_kept(run, folder):
    mine = asked(run, {}, train=str(folder), test=str(folder), protocols=["knn"])["results"]
    theirs = [{**r, "question": f"other {i}"} for i, r in enumerate(mine)]
    answers.write(run, theirs, {})  # while the first was still at work
    answers.write(run, mine, {})
    assert len(json.loads((run / "evaluation.json").read_text())["results"]) == 6


def test_what_has_no_question_stays(trained, folder, tmp_path):
    from openjepa.recipes.finetuning import Finetuning, finetune

    out = tmp_path / "classifier"
    values = {"finetune.epochs": "1", "finetune.batch_size": "8"}
    finetune(Finetuning(source=str(trained), train=str(folder), test=str(folder), out=out), values, Console(quiet=True))
    found = asked(out, {}, train=str(folder), test=str(folder), protocols=["knn"], out=out)["results"]
    assert [r["protocol"] for r in found] == ["finetune:low_shot", "knn", "knn", "knn"]


def test_values_that_are_not_a_protocols_own_are_shown(run, folder, capsys):
    asked(run, {"knn.temperature": "0.5"}, train=str(folder), test=str(folder), protocols=["knn"])
    assert "temperature" in capsys.readouterr().out
    assert [p.changed for p in evaluation.asked(["lowshot:10%"], {"lowshot.finetune.epochs": "3"})] == [
        "finetune.epochs 3"
    ]


def test_protocols_of_one_kind_share_their_flags():
    knn, linear = evaluation.asked(["segment:knn", "segment:linear"], {"segment.min_steps": "5", "segment.ks": "3"})
    assert (knn.config.ks, linear.config.min_steps) == ((3,), 5)


def test_a_suite_fetches_nothing(run, tmp_path):
    parts, skipped = evaluation.planned(Question(source=str(run), suite="transfer", root=tmp_path))
    assert parts == []
    assert skipped["food101: knn, linear:transfer"] == "food101 is not in --root: --sets food101 fetches it"


def test_attentive_probe_learns_and_its_equal_weights_begin_as_the_mean(run, folder, tiny):
    from openjepa.evaluate.attentive import AttentivePool

    values = {"attentive.lrs": "0.01", "attentive.decays": "0.001", "attentive.epochs": "3", "attentive.min_steps": "60",
              "attentive.batch_size": "8"}  # fmt: skip
    found = asked(run, values, train=str(folder), test=str(folder), protocols=["attentive"])["results"]
    score = {r["of"]: r for r in found}
    assert score["pretrained"]["value"] > 0.9  # blue and red
    assert score["pretrained"]["details"]["chosen_head"]["lr"] == 0.01
    head = AttentivePool(24, 3)
    same = torch.randn(2, 1, 24).expand(-1, 5, -1)
    assert torch.allclose(head(same), head(same[:, :1]), atol=1e-6)  # weights sum to one


def test_quality_needs_neither_labels_nor_a_test_set(run, folder, capsys):
    flat = run.parent / "flat"
    flat.mkdir()
    for file in folder.rglob("*.png"):
        shutil.copy(file, flat / f"{file.parent.name}{file.name}")
    assert not open_source(str(flat)).labels
    few = {"quality.lidar_images": "20", "quality.lidar_views": "3"}
    found = asked(run, few, train=str(flat), protocols=["quality"])["results"]
    assert {(r["metric"], r["of"]) for r in found} == {
        (metric, of) for metric in ("RankMe", "alpha-ReQ", "LiDAR") for of in ("pretrained", "random weights")
    }
    assert all(1 <= r["value"] <= 24 for r in found if r["metric"] == "RankMe")
    assert "are in the training set" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "evaluate on what?"),
        (["--train", "scenes:8"], "give both sets"),
        (["--train", "scenes:8", "--test", "scenes:8", "--sets", "cifar10"], "or --sets by name"),
        (["--suite", "papers"], "did you mean 'paper'"),
        (["--suite", "paper", "--protocols", "knn"], "brings its own"),
        (["--sets", "cifar", "--root", "."], "no data set 'cifar' in ."),
        (["--sets", "cifar10", "--root", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_get_one_line(run, monkeypatch, capsys, words, says):
    assert says in refused(monkeypatch, capsys, "evaluate", str(run), *words)

"""Claims about accuracy against the number of labels, of a pretrained encoder and from scratch."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from openjepa.data.sources import open_source
from openjepa.evaluate import labels as method
from openjepa.evaluate.features import View
from openjepa.evaluate.labels import FINETUNED, LEARNERS, PROBED, RECIPES, SCRATCH, Contest, LabelsConfig, from_scratch
from openjepa.evaluate.linear import LinearConfig
from openjepa.evaluate.subjects import Bench, Subject, tasks
from openjepa.recipes import labels as command_of
from openjepa.recipes.evaluation import Question, subjects
from tests.helpers import command, refused

QUICK = ["--finetune.epochs", "2", "--finetune.batch_size", "8", "--finetune.lr", "2e-3", "--min-steps", "4", "--draws", "2",
         "--labels", "20%,100%", "--linear.min_steps", "20", "--linear.epochs", "2"]  # fmt: skip


def words(trained: Path, folder: Path, out: Path, *more: str) -> list[str]:
    return ["labels", str(trained), "--train", str(folder), "--test", str(folder), "--out", str(out), *QUICK, *more]


def contest(trained: Path, folder: Path, **values: object) -> Contest:
    """Red and blue, before a pretrained and a random tiny network."""
    encoder, control, _ = subjects(Question(source=str(trained)))
    source = open_source(str(folder), (24, 40))
    bench = Bench(source, source, View((24, 40)), 4, torch.device("cpu"), "fp32", torch.no_grad)  # nothing is trained
    config = LabelsConfig(finetune=RECIPES["small"], scratch=from_scratch(RECIPES["small"]), linear=LinearConfig())
    quiet = Console(quiet=True)
    return Contest(
        replace(config, **values), Subject("a", encoder, bench, quiet), Subject("b", control, bench, quiet),
        tasks(source, source, "class")[0], bench)  # fmt: skip


def test_the_same_labels_go_to_all_and_what_is_kept_is_not_computed_again(
    trained, folder, tmp_path, monkeypatch, capsys
):
    seen: list[tuple[str, tuple[int, ...]]] = []
    ask = Contest.ask

    def watched(self, who, rows, *more):
        seen.append((who, tuple(rows)))
        return ask(self, who, rows, *more)

    monkeypatch.setattr(Contest, "ask", watched)
    out = tmp_path / "curve"
    status, text, errors = command(monkeypatch, capsys, *words(trained, folder, out))
    assert status == 0, errors
    assert [who for who, _ in seen] == 3 * list(LEARNERS)  # two draws of a fifth, and all
    draws = [{rows for _, rows in seen[i : i + 3]} for i in (0, 3, 6)]
    assert [len(each) for each in draws] == [1, 1, 1]
    assert [len(next(iter(each))) for each in draws] == [8, 8, 40]
    assert draws[0] != draws[1]
    assert all(word in text for word in ("8 (20%)", "40 (100%)", "as good as from scratch"))
    assert (out / "labels.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((out / "labels.json").read_text())
    assert [(r["of"], r["share"], r["draw"]) for r in kept["results"]] == [
        (who, share, draw) for share, draw in ((0.2, 0), (0.2, 1), (1.0, 0)) for who in LEARNERS
    ]

    again = words(trained, folder, out)
    again[again.index("20%,100%")] = "20%,50%"  # one share that is there, one that is not
    seen.clear()
    status, text, errors = command(monkeypatch, capsys, *again)
    assert status == 0, errors
    assert "going on after 9 answers" in text
    assert [(who, len(rows)) for who, rows in seen] == [(who, 20) for _ in range(2) for who in LEARNERS]
    assert len(json.loads((out / "labels.json").read_text())["results"]) == 15
    assert all(each in text for each in ("8 (20%)", "20 (50%)", "40 (100%)")), "what was there is shown, too"


def test_a_curve_that_was_stopped_goes_on_to_the_same_numbers(trained, folder, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, capsys, *words(trained, folder, tmp_path / "whole", "--rates", "0.5,1"))[0] == 0
    ask, asked = Contest.ask, []

    def stopped(self, who, *more):
        asked.append(who)
        if len(asked) == 6:  # once its rate was chosen
            raise KeyboardInterrupt
        return ask(self, who, *more)

    monkeypatch.setattr(Contest, "ask", stopped)
    status, _, errors = command(monkeypatch, capsys, *words(trained, folder, tmp_path / "parts", "--rates", "0.5,1"))
    assert (status, errors) == (130, "openjepa: interrupted\n")
    monkeypatch.setattr(Contest, "ask", ask)
    assert command(monkeypatch, capsys, *words(trained, folder, tmp_path / "parts", "--rates", "0.5,1"))[0] == 0
    found = []
    for name in ("whole", "parts"):
        kept = json.loads((tmp_path / name / "labels.json").read_text())
        found.append((kept["rates"], [{**record, "seconds": 0} for record in kept["results"]]))
    assert found[0] == found[1]
    rates, _ = found[0]
    assert {(each["of"], each["share"]) for each in rates} == {
        (who, s) for who in (FINETUNED, SCRATCH) for s in (0.2, 1.0)
    }
    assert all([rate for rate, _ in each["tried"]] == [0.5, 1.0] for each in rates)


def test_a_stop_before_the_first_answer_leaves_a_folder_that_goes_on(tmp_path):
    (tmp_path / "labels.json.part").write_text("{")
    assert command_of.read(tmp_path) is None


# ---------------------------------------------------------------- fairness


def test_from_scratch_has_random_weights_no_layer_decay_and_at_least_as_many_steps(trained, folder, monkeypatch):
    before = contest(trained, folder)
    given = {}

    def noted(config, subject, task, bench, rows, *more):
        given[subject.name] = (config, len(rows))
        return torch.zeros(len(bench.test), dtype=torch.int64)

    monkeypatch.setattr(method, "finetuned", noted)
    for count in (8, 40):
        for who in (FINETUNED, SCRATCH):
            before.ask(who, np.arange(count))
        (tuned, _), (scratch, labels) = given["a"], given["b"]
        assert labels == count
        assert scratch.layer_decay == 1.0
        assert tuned.layer_decay < 1.0
        assert scratch.epochs >= 2 * tuned.epochs
        assert tuned.epochs >= before.config.min_steps  # all labels fit in one batch here
    longer = replace(before, config=replace(before.config, scratch_steps=2900))
    assert longer.planned(SCRATCH, 8).epochs == longer.planned(SCRATCH, 40).epochs == 2900  # of one batch each
    assert longer.planned(FINETUNED, 8) == before.planned(FINETUNED, 8)
    assert before.pretrained.extractor.identity["weights"] != before.random.extractor.identity["weights"]
    assert before.pretrained.extractor.identity["model"] == before.random.extractor.identity["model"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_fair_one_from_scratch(recipe):
    scratch = from_scratch(RECIPES[recipe])
    assert scratch.layer_decay == 1.0
    assert scratch.epochs >= RECIPES[recipe].epochs
    assert scratch.lr >= 5e-4


def test_rates_are_chosen_without_the_test_set(trained, folder, monkeypatch):
    before = contest(trained, folder, rates=(0.1, 1.0, 10.0))
    rows, seen = np.arange(5, 25), []

    def noted(config, subject, task, bench, fitted, images, *more):
        assert images.source is bench.train
        assert not set(fitted) & set(images.indices)
        assert set(fitted) | set(images.indices) == set(rows)
        seen.append(config.lr)
        right = task.labels[0][images.indices]
        return right if config.lr == pytest.approx(1e-3) else 1 - right

    before = replace(before, bench=replace(before.bench, test=open_source(str(folder), (24, 40))))
    monkeypatch.setattr(method, "finetuned", noted)
    assert before.choose(SCRATCH, rows) == [(0.1, 0.0), (1.0, 1.0), (10.0, 0.0)]
    assert seen == pytest.approx([1e-4, 1e-3, 1e-2])


def test_a_rate_alone_is_taken(trained, folder, tmp_path, monkeypatch, capsys):
    given = words(trained, folder, tmp_path / "curve", "--labels", "100%", "--rates", "0.3")
    assert command(monkeypatch, capsys, *given)[0] == 0
    kept = json.loads((tmp_path / "curve" / "labels.json").read_text())["results"]
    assert {each["of"]: each["rate"] for each in kept} == {FINETUNED: 0.3, SCRATCH: 0.3, PROBED: 1.0}


def test_the_probe_learns_from_the_labels_it_is_given_alone(trained, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path))
    before = contest(trained, folder, linear=LinearConfig(epochs=2, min_steps=20))
    blue = before.ask(PROBED, np.arange(20))  # one class alone: every image is taken for it
    assert blue.value == 0.5
    assert before.ask(PROBED, np.arange(40)).value > 0.9


# ---------------------------------------------------------------- numbers


def test_labels_are_worth_what_the_other_curve_needs_for_them():
    curve = [(100, 0.2), (1000, 0.4), (10_000, 0.5)]
    assert method.worth(0.3, curve) == pytest.approx(math.sqrt(100 * 1000))
    assert method.worth(0.4, curve) == pytest.approx(1000)
    assert method.worth(0.1, curve) == 0
    assert method.worth(0.4, [*curve[:2], (5000, 0.3), curve[2]]) == pytest.approx(1000)  # not the 5,000 of a plateau
    assert method.worth(0.6, curve) == math.inf
    assert command_of.said({"value": 0.3}, curve) == "about 320"
    assert command_of.said({"value": 0.6}, curve) == "more than 10,000"
    assert command_of.said({"value": 0.1}, curve) == "fewer than 100"


def test_shares_are_percent_each_once_and_rising():
    assert command_of.shares_in("100%,1%, 0.5%,1%") == [0.005, 0.01, 1.0]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--labels", "2%"], "--labels 2%: class 'blue' has 20 images, of which that is none: 5% is one"),
        (["--labels", "10"], "give shares of the labels in percent, such as 1%,10%,100%"),
        (["--labels", "0%"], "give shares of the labels in percent"),
        (["--labels", "101%"], "give shares of the labels in percent"),
        (["--labels", "many"], "give shares of the labels in percent"),
        (["--draws", "0"], "--draws 0: one at least"),
        (["--rates", "0.1,fast"], "--rates 0.1,fast: give factors"),
        (["--rates", "0"], "rates are above 0"),
        (["--rates", "nan"], "rates are above 0"),
        (["--rates", "1,inf"], "rates are above 0"),
        (["--recipe", "smal"], "did you mean 'small'"),
        (["--scratch.epoch", "3"], "did you mean 'scratch.epochs'"),
        (["--linear.views", "crop", "--linear.norms", "none"], "linear.views must be none"),
        (["--lr", "3"], "unknown option --lr"),
        (["--task", "colour"], "no task 'colour'"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(trained, folder, tmp_path, monkeypatch, capsys, more, says):
    out = tmp_path / "curve"
    assert says in refused(monkeypatch, capsys, *words(trained, folder, out, *more))
    assert not out.exists()


def test_the_answers_of_other_settings_are_not_mixed(trained, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "curve"
    given = words(trained, folder, out, "--labels", "20%", "--draws", "1")
    assert command(monkeypatch, capsys, *given)[0] == 0
    kept = (out / "labels.json").read_text()
    other = list(given)
    other[1] = str(trained / "checkpoints" / min(p.name for p in (trained / "checkpoints").iterdir()))
    for mistaken, says in (
        ([*given, "--scratch.lr", "1e-4"], "answers with scratch.lr 0.001, and it is 0.0001 now: choose another --out"),
        ([*given, "--seed", "1"], "answers with seed 0, and it is 1 now"),
        (other, "the answers of another encoder: choose another --out"),
    ):
        assert says in refused(monkeypatch, capsys, *mistaken)
        assert (out / "labels.json").read_text() == kept
    (out / "labels.json").write_text(kept[:50])
    assert "cannot be read" in refused(monkeypatch, capsys, *given)
    (out / "labels.json").unlink()  # the picture is still there
    assert "exists and is not empty" in refused(monkeypatch, capsys, *given)
    assert "exists and is not empty" in refused(monkeypatch, capsys, *words(trained, folder, trained))

"""Claims about the two commands that need no data: the demo goes from nothing to a page, the measurements print."""

import json
from dataclasses import replace

import pytest

from openjepa.evaluate import linear, protocols
from openjepa.recipes import demo
from tests.helpers import command


@pytest.fixture
def small(monkeypatch, tiny, tmp_path):
    """The demo on a few scenes and a tiny model."""
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    recipe = replace(tiny, model=replace(tiny.model, image_size=(32, 32)))
    monkeypatch.setattr(demo, "ijepa_scenes", lambda: recipe)
    short = replace(protocols.PROTOCOLS["linear"], config=replace(linear.RECIPES["fast"], min_steps=60, epochs=10))
    monkeypatch.setitem(protocols.PROTOCOLS, "linear", short)
    for name, scenes in (("TRAIN", "scenes:48"), ("LABELLED", "scenes:96"), ("TEST", "scenes:96-160")):
        monkeypatch.setattr(demo, name, scenes)


def test_the_demo_scores_four_tasks_against_both_controls_and_draws(small, monkeypatch, capsys, tmp_path):
    out = tmp_path / "demo"
    _, printed, _ = command(monkeypatch, capsys, "demo", "--out", str(out), "--seed", "3")
    assert "next: openjepa pretrain" in printed
    results = json.loads((out / "evaluation.json").read_text())["results"]
    of = {"pretrained", "random weights", "raw pixels"}
    assert {(r["task"], r["protocol"], r["of"]) for r in results} == {
        (task, protocol, name)
        for task in ("count", "distance", "color", "shape")
        for protocol in ("knn", "linear")
        for name in of
    }
    page = (out / "report.html").read_text()
    assert page.count("<img") == 8
    assert "seed: 3" in (out / "recipe.yaml").read_text()

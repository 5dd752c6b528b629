"""Claims about the report: one file, nothing from elsewhere; what cannot be shown says why and sinks nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from openjepa.recipes import faithfulness
from openjepa.recipes.report import report
from openjepa.see.figures import curves_figure
from openjepa.see.report import LARGE, Section, encoded, facts, html_table, write_report
from tests.helpers import refused


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run, alone in its folder."""
    return shutil.copytree(trained, tmp_path / "alone" / "run")


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and each section's words."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = file.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def section(self, title: str) -> str:
        found = [part for part in self.text.split("<section")[1:] if f"<h2>{title}</h2>" in part]
        assert len(found) == 1, title
        return found[0]


def test_a_report_asks_nothing_of_anyone_and_every_picture_says_what_it_is(run):
    page = Page(report(run))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#"))
    assert not re.search(r"https?://|url\(|@import", page.text)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 5  # masks, curves, surprise, patches, images
    assert all(len(attributes["alt"]) > 20 for attributes in pictures)
    assert "(prefers-color-scheme: dark)" in page.text
    assert "@media print" in page.text


def test_curves_begin_with_the_run_that_came_first(run):
    assert "came first" not in Page(report(run)).section("How training went")
    (run / "first").mkdir()
    shutil.copy(run / "metrics.jsonl", run / "first")
    assert "Grey, up to step 0: the run that came first" in Page(report(run)).section("How training went")
    before = [{"step": 2, "loss": 9.0, "feature_rank": 3.0}, {"step": 6, "loss": 8.0, "feature_rank": 4.0}]
    after = [{"step": 1, "loss": 0.2, "feature_rank": 5.0}, {"step": 3, "loss": 0.1, "feature_rank": 6.0}]
    loss, rank = curves_figure(after, before).axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 3]]  # theirs is another loss
    assert [list(line.get_xdata()) for line in rank.lines] == [[-4, 0], [1, 3]]


def test_it_says_what_was_run_on_what_and_where(run):
    said = Page(report(run)).section("What was run")
    for words in ("I-JEPA, seed 0", "images of 24x40", "40 from", "10 of 8 images", "torch", "step 10, fingerprint"):
        assert words in said


def test_a_run_whose_images_are_gone_still_shows_what_it_logged(run):
    about = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(about | {"data": "/nowhere/at all"}))
    page = Page(report(run))
    assert "<img" in page.section("How training went")
    for title in ("What it had to predict", "What surprises it", "What images look alike"):
        section = page.section(title)
        assert "<img" not in section
        assert "Not here: " in section
        assert "/nowhere/at all" in section


def test_a_run_without_checkpoints_says_so_where_weights_are_needed(run):
    shutil.rmtree(run / "checkpoints")
    page = Page(report(run))
    assert "has no checkpoint yet" in page.section("What patches look alike")
    assert "<img" in page.section("What it had to predict")
    assert "<img" in page.section("How training went")


def test_a_damaged_evaluation_and_no_log_sink_nothing(run):
    (run / "evaluation.json").write_text("{")
    (run / "metrics.jsonl").unlink()
    page = Page(report(run))
    assert "move it away" in page.section("What it is worth")
    assert "nothing has been logged" in page.section("How training went")
    assert "<img" in page.section("What images look alike")


def test_a_decoder_beside_the_run_is_found_and_another_runs_is_not(run, decoder, monkeypatch, capsys, tmp_path):
    assert "no decoder of this run" in Page(report(run)).section("What a decoder paints")
    shutil.copytree(decoder, run.parent / "painter")
    section = Page(report(run)).section("What a decoder paints")
    assert "<img" in section
    assert "painter, at its step 10, paints the block from the prediction" in section
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])  # other weights now
    assert "no decoder of this run" in Page(report(run)).section("What a decoder paints")
    before = (run / "report.html").read_text()
    assert "made for another encoder" in refused(monkeypatch, capsys, "report", str(run), "--decoder", str(decoder))
    assert "nowhere" in refused(monkeypatch, capsys, "report", str(run), "--decoder", "nowhere")
    assert (run / "report.html").read_text() == before


def test_images_that_are_others_now_are_not_drawn_as_the_runs_own(run, folder, tmp_path):
    (tmp_path / "others").mkdir()
    Image.new("RGB", (36, 40)).save(tmp_path / "others" / "a.png")
    about = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(about | {"data": str(tmp_path / "others")}))
    page = Page(report(run))
    assert "holds other images now than those that" in page.section("What images look alike")
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1  # the curves


def test_what_decode_check_found_is_beside_the_samples(run, decoder):
    painter = shutil.copytree(decoder, run / "painter")
    known = {"metrics": {"mrr": "…"}, "conditions": {"its own": {"mrr": {"value": 0.25, "interval": [0.2, 0.3]}}},
             "gallery": 40, "chance": {"mrr": 0.107}}  # fmt: skip
    (painter / faithfulness.FAITHFULNESS).write_text(json.dumps(known))
    section = Page(report(run)).section("What a decoder paints")
    assert "<td class=n>0.250 ±0.050</td>" in section
    assert "<td>chance</td><td class=n>0.107</td>" in section
    assert "ranks by distance among 40," in section
    (painter / faithfulness.FAITHFULNESS).write_text('{"metrics": 3}')
    assert "cannot be read" in Page(report(run)).section("What a decoder paints")


def test_a_decoder_has_no_report_and_neither_has_an_empty_folder(decoder, monkeypatch, capsys, tmp_path):
    assert "is a decoder and holds no encoder" in refused(monkeypatch, capsys, "report", str(decoder))
    assert "is not a run" in refused(monkeypatch, capsys, "report", str(tmp_path))


def test_names_from_elsewhere_are_words_and_no_markup(tmp_path):
    nasty = '<script>alert(1)</script>&"'
    sections = [
        Section(nasty, nasty, Figure((1, 1)), html_table([nasty], [], [[nasty]]) + facts([(nasty, nasty)]), nasty)
    ]
    write_report(tmp_path / "page.html", nasty, nasty, sections)
    page = Page(tmp_path / "page.html")
    assert "<script" not in page.text
    assert {"script"} & {tag for tag, _ in page.tags} == set()
    assert next(a["alt"] for tag, a in page.tags if tag == "img") == nasty


def test_a_picture_that_png_makes_large_is_kept_small():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    kind, data = encoded(Image.fromarray(noise))
    assert kind == "webp"
    assert len(data) < LARGE
    flat = encoded(Image.new("RGB", (400, 400)))
    assert flat[0] == "png"

"""Claims about the comparison: the same images, encoder and time for all, looked at on the way, beside controls."""

import json
from dataclasses import replace

import pytest
import torch

from openjepa.bench import compare as bench
from openjepa.bench import measure
from openjepa.bench.compare import contestants, seconds_of
from openjepa.engine.device import pick_precision
from openjepa.engine.run import Interrupted
from openjepa.errors import Diverged, UserError
from openjepa.recipes import budget
from openjepa.recipes.methods import small_crop
from openjepa.recipes.named import RECIPES
from openjepa.recipes.recipe import all_keys, override
from openjepa.see.figures import comparison_figure, mean_line
from tests.helpers import command, refused

SMALL = [
    *("--model.depth", "2", "--model.width", "48", "--data.batch_size", "16"),
]


def test_three_methods_are_compared_on_scenes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "pace", lambda *_: 320.0)
    monkeypatch.setattr(bench, "PROBE", replace(bench.PROBE, lrs=(0.1,), epochs=2, min_steps=10))
    file, picture = tmp_path / "here.json", tmp_path / "compared.png"
    words = [
        "bench",
        "compare",
        "--data",
        "scenes:200",
        "--budget",
        "1s",
        "--looks",
        "2",
        "--out",
        str(file),
        "--plot",
        str(picture),
        *SMALL,
    ]
    status, *_ = command(monkeypatch, capsys, *words)
    assert status == 0
    assert picture.stat().st_size > 10_000
    (record,) = json.loads(file.read_text()).values()
    rows = record["rows"]
    assert record["command"].startswith("openjepa bench compare --data scenes:200 --budget 1s --looks 2")
    for name in ("ijepa", "mae", "mae, class token", "ibot", "ibot, class token"):
        looks = [row for row in rows if row["who"] == name]
        assert len(looks) == 2
        first, last = looks
        assert 0 < first["seconds"] < last["seconds"]
        assert last["step"] == 2 * first["step"]
        assert last["images"] == 16 * last["step"]
        (begun,) = (row for row in rows if row["who"] == f"{name}, random weights")
        assert begun["step"] == 0
    assert rows[-1]["who"] == "raw pixels"
    assert all(0 < row[metric] < 1 for row in rows for metric in ("knn", "linear"))


def test_a_run_that_comes_first_is_paid_for_and_looked_at(monkeypatch, capsys):
    monkeypatch.setattr(budget, "PACE_STEPS", 4)
    monkeypatch.setattr(bench, "PROBE", replace(bench.PROBE, lrs=(0.1,), epochs=2, min_steps=10))
    monkeypatch.setattr(bench, "pace", lambda recipe, *_: {"mae": 200.0, "ijepa": 100.0}[recipe.method])
    values = {
        "model.depth": "1",
        "model.width": "24",
        "model.heads": "2",
        "data.batch_size": "10",
        "predictor.depth": "1",
    }
    changes = {
        "schedule.epochs": "2",
        "first.schedule.epochs": "2",
    }  # so: a third, two
    word = ":".join(["ijepa_cifar10_cpu", *(f"{name}={value}" for name, value in changes.items())])
    rows = bench.compare("scenes:100", None, word, "6s", "0", "3", values)
    looks = [row for row in rows if row["who"] == word]
    assert [row["images"] for row in looks] == [400, 600, 800]  # 2 s of 200 images, then 4 s of 100
    assert [row["step"] for row in looks] == [40, 60, 80]
    assert looks[0]["seconds"] < looks[1]["seconds"] < looks[2]["seconds"]
    assert "mae, 200 images/s, 40 steps" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch) -> list[tuple[str, int]]:
    """Contestants that show what they always show; which were asked, with their seeds."""
    asked = []

    def looked_at(name, recipe, *_):
        asked.append((name, recipe.seed))
        if len(asked) == 4:
            raise Interrupted("checkpoint written", 75)
        return [{**bench.control(name, recipe.seed, {"knn": 0.5, "linear": 0.5}), "step": 5, "seconds": 1.0}]

    monkeypatch.setattr(bench, "looked_at", looked_at)
    monkeypatch.setattr(bench, "PROBE", replace(bench.PROBE, lrs=(0.1,), epochs=1, min_steps=1))
    return asked


def test_a_stopped_comparison_goes_on_with_the_next_contestant(quick, monkeypatch, capsys, tmp_path):
    file = tmp_path / "here.json"
    file.write_text(json.dumps({"masks": {"rows": []}}))
    words = ["bench", "compare", "--data", "scenes:80", "--seeds", "0,1", "--out", str(file), *SMALL]
    name = "compare, scenes:80, 0,1, model.depth=2, model.width=48, data.batch_size=16"
    status, _, said = command(monkeypatch, capsys, *words)
    assert status == 75
    assert said.endswith(f"stopped: 8 rows are kept in {file}: the same command goes on\n")
    kept = json.loads(file.read_text())
    assert list(kept) == ["masks", f"{name} (unfinished)"]
    shown = [row["who"] for row in kept[f"{name} (unfinished)"]["rows"] if row["step"]]
    assert shown == ["ijepa", "mae", "ibot"]
    status, _, said = command(monkeypatch, capsys, *words)
    assert status == 0
    assert f"{file}: going on after 8 rows" in said
    assert quick[4:] == [("ijepa", 1), ("mae", 1), ("ibot", 1)]
    done = json.loads(file.read_text())
    assert list(done) == ["masks", name]
    assert done[name]["rows"][:8] == kept[f"{name} (unfinished)"]["rows"]
    assert len(done[name]["rows"]) == 17


def test_what_another_environment_kept_is_measured_anew(quick, monkeypatch, capsys, tmp_path):
    words = ["bench", "compare", "--data", "scenes:80", "--seeds", "0,1", "--out", str(tmp_path / "here.json")]
    assert command(monkeypatch, capsys, *words, *SMALL)[0] == 75
    monkeypatch.setattr(measure, "environment", lambda: {"torch": "another"})
    status, _, said = command(monkeypatch, capsys, *words, *SMALL)
    assert status == 0
    assert "another environment's: all is measured anew" in said
    assert len(quick) == 4 + 6


def test_another_question_has_a_record_of_its_own(quick, monkeypatch, capsys, tmp_path):
    file = tmp_path / "here.json"
    for more in ([], ["--looks", "2"], ["--model.heads", "2"]):
        words = ["--data", "scenes:80", "--methods", "mae", *SMALL, *more]
        assert command(monkeypatch, capsys, "bench", "compare", *words, "--out", str(file))[0] == 0
    assert len(json.loads(file.read_text())) == 3


def test_no_more_looks_are_taken_than_steps_fit(monkeypatch):
    monkeypatch.setattr(bench, "pace", lambda *_: 32.0)
    monkeypatch.setattr(bench, "PROBE", replace(bench.PROBE, lrs=(0.1,), epochs=1, min_steps=1))
    values = {"model.depth": "1", "model.width": "48", "data.batch_size": "16"}
    rows = bench.compare("scenes:80", None, "mae", "2s", "0", "60", values)
    assert [row["step"] for row in rows if row["who"] == "mae"] == [1, 2, 3, 4]


def test_a_comparison_that_keeps_nothing_says_so(quick, monkeypatch, capsys):
    status, _, said = command(monkeypatch, capsys, "bench", "compare", "--data", "scenes:80", "--seeds", "0,1", *SMALL)
    assert status == 75
    assert (
        said
        == "images of 32x32 pixels, patches of 4, an encoder 48 wide and 2 deep\nstopped: nothing of this measurement is kept\n"
    )


def test_one_that_stops_learning_is_left_out_and_the_others_go_on(quick, monkeypatch, capsys):
    shown = bench.looked_at

    def looked_at(name, *more):
        if name == "mae":
            raise Diverged("10 steps in a row were not finite; begin again")
        return shown(name, *more)

    monkeypatch.setattr(bench, "looked_at", looked_at)
    words = ["bench", "compare", "--data", "scenes:80", "--json", *SMALL]
    status, said, noted = command(monkeypatch, capsys, *words)
    assert status == 0
    assert "mae, seed 0, is left out: 10 steps in a row were not finite\n" in noted
    assert [row["who"] for row in json.loads(said)["rows"] if row["step"]] == ["ijepa", "ibot"]
    status, said, noted = command(monkeypatch, capsys, *words, "--methods", "mae")
    assert (status, said) == (2, "")
    assert noted.endswith("openjepa: no contestant learned to its end\n")


def test_each_is_computed_as_its_recipe_says(quick, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "looked_at", lambda name, recipe, *_: seen.append(recipe.precision) or [])
    bench.compare(
        "scenes:80", None, "mae,mae:precision=fp32", "1s", values={"model.depth": "1", "data.batch_size": "16"}
    )
    assert seen == [pick_precision("auto", torch.device("cpu")), "fp32"]


def test_every_contestant_has_its_line_however_many_there_are():
    rows = [
        {**bench.control(name, 0, {"knn": 0.5, "linear": 0.5}), "step": step, "seconds": float(step)}
        for name in "abcdefgh"
        for step in (1, 2)
    ]
    figure = comparison_figure([*rows, bench.control("raw pixels", 0, {"knn": 0.4, "linear": 0.4})])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*"abcdefgh", "raw pixels"]
    assert len({(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}) == 9


def test_what_two_processes_kept_is_drawn_as_one_comparison(quick, monkeypatch, capsys, tmp_path):
    files = [tmp_path / f"{seed}.json" for seed in (0, 1)]
    for seed, file in enumerate(files):
        words = ["--data", "scenes:80", "--methods", "mae", "--seeds", str(seed), "--out", str(file)]
        assert command(monkeypatch, capsys, "bench", "compare", *words, *SMALL)[0] == 0
    picture, both = tmp_path / "both.png", ",".join(map(str, files))
    monkeypatch.setattr(bench, "contestants", None)  # nothing is measured
    status, said, _ = command(monkeypatch, capsys, "bench", "compare", "--kept", both, "--plot", str(picture), "--json")
    assert status == 0
    assert [(row["who"], row["seed"]) for row in json.loads(said)["rows"] if row["step"]] == [("mae", 0), ("mae", 1)]
    assert picture.stat().st_size > 10_000
    told = refused(monkeypatch, capsys, "bench", "compare", "--kept", f"{both},{files[1]}")
    assert "both hold mae, seed 1" in told
    two = {name: json.loads(file.read_text()) for name, file in zip("ab", files, strict=True)}
    files[0].write_text(json.dumps({f"compare {name}": next(iter(kept.values())) for name, kept in two.items()}))
    assert "holds 2 comparisons" in refused(monkeypatch, capsys, "bench", "compare", "--kept", str(files[0]))
    assert "no measurements" in refused(monkeypatch, capsys, "bench", "compare", "--kept", str(picture))
    for beside in (("--methods", "mae"), ("--data", "scenes:80"), ("--model.width", "8")):
        told = refused(monkeypatch, capsys, "bench", "compare", "--kept", str(files[1]), *beside)
        assert f"--kept measures nothing: leave {beside[0]} out" in told


def test_seeds_of_other_numbers_of_looks_have_a_mean():
    lines = [([0.0, 1.0, 2.0], [0.0, 10.0, 20.0]), ([0.0, 2.0], [0.0, 40.0])]
    x, y = mean_line(lines)
    assert x.tolist() == [0, 1, 2]
    assert y.tolist() == [0, 15, 30]
    x, y = mean_line([([0.0, 4.0], [1.0, 2.0]), ([0.0, 8.0], [3.0, 6.0])])
    assert (x.tolist(), y.tolist()) == ([0, 6], [2, 4])


def test_values_of_an_ablation_may_be_ranges():
    words = "ijepa:masking.target_scale=[0.1,0.2]:masking.targets=2,mae"
    assert bench.split(words, ",") == [words[:-4], "mae"]
    braces = "ijepa:first={method: mae, seed: 1}:masking.targets=2"
    assert bench.split(f"{braces},mae", ",") == [braces, "mae"]
    assert bench.split(braces, ":") == ["ijepa", "first={method: mae, seed: 1}", "masking.targets=2"]
    (ijepa,) = contestants(bench.split(words, ",")[:1], {})
    assert (ijepa.recipe.masking.target_scale, ijepa.recipe.masking.targets) == ((0.1, 0.2), 2)


def test_ablations_are_contestants_like_others():
    plain, pixels = contestants(["ijepa", "ijepa:loss.target=pixels:masking.targets=2"], {"model.depth": "1"})
    assert plain.recipe.loss.target == "encoder"
    assert (pixels.recipe.loss.target, pixels.recipe.masking.targets) == ("pixels", 2)
    assert pixels.recipe.model == plain.recipe.model


def test_all_methods_take_the_images_that_the_page_gives_them():
    """docs/comparison.md: for photographs."""
    entered = contestants(["ijepa", "mae", "ibot"], {"model.image_size": "96", "model.patch_size": "12"})
    bench.refuse_late_mistakes(entered, 5000)
    assert [small_crop(each.recipe) for each in entered[2:]] == [(48, 48)]


def test_what_a_method_does_in_epochs_is_stretched_over_its_time():
    (ibot,) = contestants(["ibot"], {})
    for steps, factor in ((1000, 2.5), (180, 0.45)):  # of 4 epochs of 100
        made = bench.stretched(ibot.recipe, steps, 100, 20)
        assert made.schedule.epochs == 4 * factor
        assert made.schedule.warmup_epochs == pytest.approx(0.5 * factor)
        of_run = made.ibot.of_run(made.schedule.epochs)
        assert of_run.freeze_last_layer_epochs == pytest.approx(min(1, 0.5 * factor))
        at = [of_run.temperatures(share * made.schedule.epochs)[0] for share in (0, 0.125, 0.25, 1)]
        assert at == pytest.approx([0.04, 0.055, 0.07, 0.07])  # risen after a quarter of the run, however long it is


@pytest.mark.parametrize("name", ["ijepa_imagenette_cpu", "ibot_cifar10_cpu"])
def test_whatever_is_said_in_epochs_is_stretched(name):
    told = {"ibot.freeze_last_layer_epochs": "0.5", "ibot.temperature_epochs": "1"} if name.startswith("ibot") else {}
    recipe = override(RECIPES[name](), told)
    long = bench.stretched(recipe, round(20 * recipe.schedule.epochs), 10, 20)  # twice as long
    for key in (key for key in all_keys() if key.endswith("epochs")):
        part, _, name = key.partition(".")
        before, after = (getattr(getattr(r, part), name) for r in (recipe, long))
        if before is None:  # a share of the run
            continue
        assert after == pytest.approx(2 * before), key


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "ijepa,mea"], "'mea' is neither a method nor a recipe; did you mean 'mae'? (ijepa, mae, ibot;"),
        (["--methods", "rcdm"], "'rcdm' is neither a method nor a recipe"),
        (["--methods", ""], "--methods is empty"),
        (["--seeds", "0,00"], "each once"),
        (["--loss.target", "pixels"], "--methods mae: 'loss' is a part of ijepa"),
        (["--kept", "a.json,"], "--kept is empty"),
        (
            [
                "--methods",
                "mae,ibot:crops.small=64:data.batch_size=80:model.image_size=[2400,2400]",
                "--data",
                "scenes:80",
            ],
            "other encoders (model.image_size",
        ),
        (["--methods", "mae,mae"], "name each once"),
        (["--methods", "ijepa:loss.target"], "'loss.target' is no key=value"),
        (["--methods", "ijepa:loss.target=pixel"], "did you mean 'pixels'"),
        (["--methods", "ijepa,mae:model.depth=2"], "other encoders (model.depth: 6 -> 2)"),
        (["--methods", "ijepa,mae:model.registers=4"], "other encoders (model.registers: 0 -> 4)"),
        (["--methods", "mae:seed=7"], "seed is the comparison's own; give --seeds"),
        (["--monitors.log_every", "5"], "monitors.log_every is the comparison's own"),
        (["--methods", "mae:optim.lr=1e-3:optim.lr=1e-4"], "a key is given twice"),
        (["--kept", ""], "--kept is empty"),
        (["--budget", "soon"], "give a time such as"),
        (["--budget", "0s"], "give a time such as"),
        (["--seeds", "one"], "give whole numbers"),
        (["--seeds", "0,0"], "each once"),
        (["--looks", "0"], "1 or more"),
        (["--methods", "ijepa,ijepa:predictor.width=100", "--data", "scenes:80", *SMALL], "set predictor.heads"),
        (["--methods", "ijepa,mae:data.batch_size=90", "--data", "scenes:80", *SMALL], "larger than the data set"),
        (["--masking.hidden", "0.5"], "'masking' is a part of ijepa and mae"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(monkeypatch, capsys, words, told):
    assert told in refused(monkeypatch, capsys, "bench", "compare", *words)


def test_its_options_go_with_nothing_else(monkeypatch, capsys):
    assert "--budget goes with bench compare" in refused(monkeypatch, capsys, "bench", "masks", "--budget", "1s")
    with pytest.raises(UserError):
        seconds_of("10")

"""Claims about the command line: quick, one line for each mistake, and it says what comes next."""

import json
import os
import subprocess
import sys

import pytest

from openjepa import cli
from openjepa.recipes.recipe import to_yaml
from tests.helpers import command, make_parquet, make_shards, refused


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['openjepa', '--help']\nfrom openjepa.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    out = python(code + "print('torch' in sys.modules)")
    assert "pretrain" in out
    assert out.rstrip().endswith("False")


def test_the_package_imports_nothing_heavy():
    assert python("import sys, openjepa; print(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))") == "False\n"


def test_public_names_are_there():
    import openjepa

    for name in openjepa.__all__:
        assert getattr(openjepa, name) is not None
    with pytest.raises(AttributeError):
        _ = openjepa.nothing


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("pretrain --recipe ijepa_cifar --data x --out {tmp}/r", "did you mean 'ijepa_cifar10'"),
        ("pretrain --data x --out {tmp}/r", "which recipe?"),
        ("pretrain --recipe ijepa_scenes --out {tmp}/r", "which images?"),
        ("pretrain --recipe ijepa_scenes --data {tmp}/none --out {tmp}/r", "no such file or folder"),
        ("pretrain --recipe ijepa_scenes --data scenes:9 --out {tmp}/r --optim.lrr 1", "did you mean 'optim.lr'"),
        ("pretrain --recipe ijepa_scenes --data scenes:9 --out {tmp}/r --optim.lr", "--optim.lr needs a value"),
        ("pretrain --recipe ijepa_scenes --data scenes:9 --out {tmp}/r --optim.lr 0", "optim.lr is 0"),
        ("pretrain --recipe ijepa_scenes --data scenes:9 --out {tmp}/r", "larger than the data set of 9"),
        ("pretrain --recipe ijepa_scenes --data scenes:99 --out {tmp}/file", "not a run"),
        (
            "pretrain --recipe ijepa_scenes --data scenes:99 --out {tmp}/r --machine.device cuda:9",
            "machine.device 'cuda:9'",
        ),
        ("pretrain --config {tmp}/no.yaml --data x --out {tmp}/r", "No such file"),
        ("pretrain --config {tmp}/bad.yaml --data x --out {tmp}/r", "is not YAML"),
        ("pretrain --config {tmp}/file --data x --out {tmp}/r", "expected keys and values"),
        ("pretrain --recipe ijepa_scenes --data x --out {tmp}/r stray", "unexpected argument 'stray'"),
        ("evaluate {tmp}/none --train x --test x", "no such file or folder"),
        ("report {tmp}/none", "is not a run"),
        ("recipes nothing", "unknown recipe"),
        ("import {tmp}/none --out {tmp}/r", "no such file or folder"),
        ("import {tmp}/file --out {tmp}/r", "{tmp}/file"),
        ("import {tmp}/file --out {tmp}/r --model.heads x", "model.heads is 'x'"),
        ("export {tmp}/none --format hf --out {tmp}/r", "no such file or folder"),
        ("export {tmp}/none --format hff --out {tmp}/r", "did you mean 'hf'"),
        ("export {tmp}/none --format released --out {tmp}/r", "is not a run"),
        ("export {tmp}/none --format hf --out {tmp}", "is not empty"),
        ("export {tmp}/none --format hf --out {tmp}/r --image-size 3,4,5", "expected 2 numbers"),
        ("export {tmp}/none --format released --network encoder --out {tmp}/r", "leave --network out"),
        ("import {tmp}/file --out {tmp}/r --model.heads [3", "not a value"),
    ],
)
def test_mistakes_get_one_line_and_status_two(monkeypatch, capsys, tmp_path, words, says):
    (tmp_path / "bad.yaml").write_text("a: [1")
    (tmp_path / "file").write_text("hello")
    assert says.format(tmp=tmp_path) in refused(monkeypatch, capsys, *words.format(tmp=tmp_path).split())
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("number", [*cli.DISK, *cli.NETWORK])
def test_a_disk_or_a_network_that_fails_gets_one_line_wherever_it_does(monkeypatch, capsys, tmp_path, number):
    def failing(args, rest):
        raise OSError(number, os.strerror(number), str(tmp_path / "a\nb"))

    monkeypatch.setitem(cli.COMMANDS, "report", failing)
    told = refused(monkeypatch, capsys, "report", "x")
    assert told.startswith(f"openjepa: {tmp_path}/a\\nb: {os.strerror(number)}: see to the ")
    assert ("see to the network" in told) == (number in cli.NETWORK)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "report", lambda args, rest: os.stat("/no/such/file"))
    with pytest.raises(FileNotFoundError):
        command(monkeypatch, capsys, "report", "x")


def test_recipes_are_listed_and_printed(monkeypatch, capsys):
    _, listed, _ = command(monkeypatch, capsys, "recipes")
    assert "ijepa_cifar10_cpu" in listed
    _, printed, _ = command(monkeypatch, capsys, "recipes", "ijepa_cifar10_cpu")
    assert "patch_size: 4" in printed


def test_pretrain_evaluate_report(monkeypatch, capsys, tmp_path, tiny, folder):
    """The whole way of a user with a folder of images."""
    out = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(to_yaml(tiny))
    status, text, _ = command(
        monkeypatch,
        capsys,
        "pretrain",
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--data",
        str(folder),
        "--out",
        str(out),
    )
    assert status == 0
    assert "next: openjepa evaluate" in text
    page = (out / "report.html").read_text()
    assert page.count("<img") == 5
    assert "http:" not in page
    assert "https:" not in page  # self-contained
    status, text, _ = command(monkeypatch, capsys, "pretrain", "--out", str(out))  # the run knows its recipe and data
    assert status == 0
    status, text, _ = command(monkeypatch, capsys, "evaluate", str(out), "--train", str(folder), "--test", str(folder))
    assert status == 0
    assert "raw pixels" in text
    status, text, _ = command(monkeypatch, capsys, "report", str(out))
    assert (out / "report.html").read_text().count("<img") == 8  # scores, classes and confusion, too


def test_real_images_give_the_same_losses_from_a_folder_parquet_and_shards(
    monkeypatch, capsys, tmp_path, tiny, real_images
):
    photographs = tmp_path / "folder"
    unpack = [sys.executable, str(real_images / "unpack.py"), "imagenette160", "val", str(photographs), "--limit", "48"]
    subprocess.run(unpack, check=True, capture_output=True)
    files = sorted(photographs.rglob("*.jpg"))
    names = sorted({file.parent.name for file in files})
    labels = [names.index(file.parent.name) for file in files]
    make_parquet(tmp_path / "photographs.parquet", files, labels, names)
    make_shards(tmp_path, files, labels)
    (tmp_path / "recipe.yaml").write_text(to_yaml(tiny))
    losses = []
    for number, data in enumerate((photographs, tmp_path / "photographs.parquet", tmp_path / "s-{00..01}.tar")):
        out = tmp_path / f"run{number}"
        words = ["--config", str(tmp_path / "recipe.yaml"), "--data", str(data), "--out", str(out)]
        status, _, errors = command(monkeypatch, capsys, "pretrain", *words)
        assert status == 0, errors
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in logged if "loss" in line])
    assert len(losses[0]) == 12
    assert losses[0] == losses[1] == losses[2]


def test_a_released_recipe_runs_directly_and_its_run_can_leave_and_come_back(
    monkeypatch, capsys, tmp_path, folder, golden
):
    """The largest of the released recipes, its model made small on the command line."""
    out, config = tmp_path / "run", golden / "configs" / "in22k_vitg16_ep44.yaml"
    small = "--model.size Ti --model.width 24 --model.heads 2 --model.depth 1 --predictor.width 16 --predictor.depth 1"
    short = "--schedule.epochs 1 --schedule.warmup_epochs 0.5 --machine.workers 0 --data.batch_size 8"
    words = ["--config", str(config), "--data", str(folder), "--out", str(out), *small.split(), *short.split()]
    status, _, errors = command(monkeypatch, capsys, "pretrain", *words)
    assert status == 0, errors
    assert "behaviour: released" in (out / "recipe.yaml").read_text()
    status, text, errors = command(
        monkeypatch, capsys, "export", str(out), "--format", "released", "--out", str(tmp_path / "x")
    )
    assert status == 0, errors
    assert "checkpoint.pth.tar" in text
    status, text, errors = command(
        monkeypatch,
        capsys,
        "import",
        str(tmp_path / "x" / "checkpoint.pth.tar"),
        "--out",
        str(tmp_path / "y"),
        "--model.heads",
        "2",
    )
    assert status == 0, errors
    assert "24 wide, 1 deep, 2 heads, patches of 16, images of 224x224, step 5" in text
    status, _, errors = command(monkeypatch, capsys, "report", str(tmp_path / "y"))
    assert status == 2
    assert "has seen no images yet" in errors

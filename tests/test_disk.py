"""Claims about real disks: full, read-only, closed to the user, or with a byte that changed by itself."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from openjepa.engine.checkpoint import checkpoints
from openjepa.recipes.embedding import Embedding, embed
from openjepa.recipes.exchange import load
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe, from_dict, override, to_yaml
from tests.conftest import TINY
from tests.helpers import command, refused

ORDINARY = 65534  # the user called nobody


def mounted(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    if not shutil.which("mount") or not mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)):
        pytest.skip("file systems cannot be mounted here: that takes root on Linux")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@pytest.fixture(scope="module")
def half_done(folder, tmp_path_factory) -> tuple[Recipe, Path]:
    recipe = from_dict(Recipe, TINY | {"machine": {"checkpoint_every": 0.6, "keep": 9}})
    run = tmp_path_factory.mktemp("half") / "run"
    pretrain(recipe, str(folder), run, Console(quiet=True))
    shutil.rmtree(checkpoints(run)[-1].path)
    return recipe, run


@pytest.fixture
def begun(half_done, tmp_path) -> tuple[Recipe, Path]:
    """A run of ten steps that has taken nine, and has the checkpoints of three moments."""
    shutil.copytree(half_done[1], tmp_path / "begun")
    return half_done[0], tmp_path / "begun"


def words(recipe: Recipe, folder: Path, run: Path, config: Path) -> list[str]:
    config.write_text(to_yaml(recipe))
    return ["pretrain", "--config", str(config), "--data", str(folder), "--out", str(run)]


def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(monkeypatch, capsys, tmp_path, tiny, folder):
    recipe = override(tiny, {"machine.checkpoint_every": "0.2", "machine.keep": "9"})
    with small_disk(tmp_path / "disk", "1m") as disk:
        again = words(recipe, folder, disk / "run", tmp_path / "recipe.yaml")
        status, _, error = command(monkeypatch, capsys, *again)
        assert status == 2
        assert "cannot write the checkpoint of step" in error.splitlines()[-1]
        assert "No space left on device" in error.splitlines()[-1]
        stopped = checkpoints(disk / "run")[-1].step
        assert 1 <= stopped < 10
        assert f"the one of step {stopped} is intact" in error
        assert "Traceback" not in error
        load(disk / "run")
        assert mounted("-o", "remount,size=64m", str(disk))
        status, said, _ = command(monkeypatch, capsys, *again)
        assert status == 0
        assert f"going on from step {stopped} of 10" in said


@pytest.mark.parametrize("what", ["pretrain", "export", "import", "evaluate", "report", "finetune", "embed", "search"])
def test_a_full_disk_is_told_in_one_line_by_every_command(monkeypatch, capsys, tmp_path, begun, folder, what):
    with small_disk(tmp_path / "disk", "4k") as disk:
        status, _, error = command(monkeypatch, capsys, *every_command(what, *begun, folder, disk, tmp_path))
        assert status == 2
        assert "No space left on device" in error.splitlines()[-1]
        if what in ("export", "import", "finetune", "search"):
            assert not list(disk.iterdir())


@pytest.mark.parametrize(
    "what", ["pretrain", "go on", "export", "import", "evaluate", "report", "finetune", "embed", "search"]
)
def test_a_read_only_disk_is_told_in_one_line_by_every_command(monkeypatch, capsys, tmp_path, begun, folder, what):
    with small_disk(tmp_path / "disk", "64m") as disk:
        if what != "report":
            shutil.copytree(begun[1], disk / "run")
        given = every_command(what, *begun, folder, disk, tmp_path)
        assert mounted("-o", "remount,ro", str(disk))
        error = refused(monkeypatch, capsys, *given)
        assert str(disk) in error
        assert "Read-only file system" in error or "no folder that can be written to" in error


def every_command(what: str, recipe: Recipe, run: Path, folder: Path, disk: Path, tmp_path: Path) -> list[str]:
    """A command that writes to the disk."""
    labelled = ["--train", str(folder), "--test", str(folder)]
    if what == "import":
        from openjepa.recipes.exchange import export

        export(str(run), "safetensors", tmp_path / "exported")
    features = tmp_path / "features.parquet"
    if what == "search":
        embed(Embedding(run=str(run), data=str(folder), out=features), Console(quiet=True))
    if what == "report":
        (disk / "run").mkdir(exist_ok=True)
        for name in ("recipe.yaml", "data.json", "metrics.jsonl"):
            (disk / "run" / name).symlink_to(run / name)
        (disk / "run" / "checkpoints").symlink_to(run / "checkpoints")
    return {
        "pretrain": words(recipe, folder, disk / "new", tmp_path / "recipe.yaml"),
        "go on": words(recipe, folder, disk / "run", tmp_path / "recipe.yaml"),
        "export": ["export", str(run), "--format", "safetensors", "--out", str(disk / "new")],
        "import": ["import", str(tmp_path / "exported" / "target_encoder.safetensors"), "--out", str(disk / "new")],
        "evaluate": ["evaluate", str(run), *labelled, "--protocols", "knn", "--out", str(disk / "new")],
        "report": ["report", str(disk / "run")],
        "finetune": ["finetune", str(run), *labelled, "--out", str(disk / "new"), "--finetune.epochs", "1"],
        "embed": ["embed", str(run), "--data", str(folder), "--out", str(disk / "new.parquet")],
        "search": ["search", "build", str(features), "--out", str(disk / "new")],
    }[what]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may reach, which tmp_path is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Without root's power to open what is closed."""
    powers = os.geteuid() == 0
    if powers:
        os.seteuid(ORDINARY)
    try:
        yield
    finally:
        if powers:
            os.seteuid(0)


def test_what_is_closed_to_the_user_is_told_in_one_line(monkeypatch, capsys, begun, folder, open_folder):
    recipe, run = begun
    shutil.copytree(folder, open_folder / "images")
    shutil.copytree(run, open_folder / "run")
    again = words(recipe, open_folder / "images", open_folder / "run", open_folder / "recipe.yaml")
    for path in open_folder.rglob("*"):
        path.chmod(0o777)
    newest = checkpoints(open_folder / "run")[-1].path

    def told(*given: str) -> str:
        with ordinary_user():
            return refused(monkeypatch, capsys, *given)

    (newest / "weights.safetensors").chmod(0)
    assert f"{newest} is damaged (weights.safetensors: Permission denied" in told(*again)
    (newest / "weights.safetensors").chmod(0o666)
    (newest.parent).chmod(0o555)
    error = told(*again)
    assert f"cannot write the checkpoint of step 10 to {newest.parent} (Permission denied)" in error
    assert f"the one of step {checkpoints(open_folder / 'run')[-1].step} is intact" in error
    (newest.parent).chmod(0o777)
    (open_folder / "closed").mkdir()
    (open_folder / "closed").chmod(0o555)
    new = open_folder / "closed" / "new"
    assert f"cannot write to {new}: Permission denied" in told(*again[:-1], str(new))
    assert f"cannot write to {new}" in told("export", str(open_folder / "run"), "--format", "timm", "--out", str(new))
    (open_folder / "recipe.yaml").chmod(0)
    assert "recipe.yaml: Permission denied" in told(*again)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "checksums.txt"])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_byte_that_changed_is_found_and_nothing_is_deleted(monkeypatch, capsys, tmp_path, begun, folder, file, where):
    recipe, run = begun
    newest = checkpoints(run)[-1].path
    damaged = bytearray((newest / file).read_bytes())
    damaged[int(where * (len(damaged) - 1))] ^= 0x10
    (newest / file).write_bytes(damaged)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    error = refused(monkeypatch, capsys, *words(recipe, folder, run, tmp_path / "recipe.yaml"))
    assert f"checkpoint {newest} is damaged (" in error
    assert f"({file}: " in error or file == "checksums.txt"  # whose lines are other files'
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


def test_without_its_checksums_a_checkpoint_is_not_read(monkeypatch, capsys, tmp_path, begun, folder):
    recipe, run = begun
    newest = checkpoints(run)[-1].path
    (newest / "checksums.txt").unlink()
    error = refused(monkeypatch, capsys, *words(recipe, folder, run, tmp_path / "recipe.yaml"))
    assert f"checkpoint {newest} is damaged (checksums.txt: No such file" in error


def test_a_damaged_checkpoint_moved_away_lets_the_one_before_go_on(monkeypatch, capsys, tmp_path, begun, folder):
    recipe, run = begun
    *_, older, newest = checkpoints(run)
    newest.path.rename(newest.path.with_suffix(".bad"))
    status, said, _ = command(monkeypatch, capsys, *words(recipe, folder, run, tmp_path / "recipe.yaml"))
    assert status == 0
    assert f"going on from step {older.step} of 10" in said
    assert newest.path.with_suffix(".bad").exists()

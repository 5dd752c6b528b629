"""Claims about `openjepa pack`: what was packed is what was there, in shards that are the same each time."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from openjepa.data.sources import open_source
from openjepa.errors import UserError
from openjepa.recipes import packing
from openjepa.recipes.packing import pack
from tests.helpers import command, make_parquet, refused, steps_of

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "new/set"
    return out, pack(str(folder), out, 50_000, QUIET)


def test_a_packed_set_gives_the_batches_of_its_source(folder, packed):
    out, said = packed
    before, after = open_source(str(folder)), open_source(said.spec)
    assert said.shards > 2
    assert np.array_equal(before.labels["label"], after.labels["label"])
    assert before.classes == after.classes == {"label": ["blue", "red"]}
    assert before.fingerprint() == after.fingerprint()
    for step in (0, 7):
        a, b = steps_of(before).batch(step), steps_of(after).batch(step)
        assert torch.equal(a.images, b.images)
        assert np.array_equal(a.indices, b.indices)
    assert open_source(str(out)).fingerprint() == after.fingerprint()  # the folder names its shards


def test_the_index_beside_the_shards_is_read_and_a_changed_shard_is_indexed_anew(packed, tmp_path, monkeypatch):
    out, said = packed
    assert open_source(said.spec).index.file == out / "openjepa.index"
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path))
    shard = out / "shard-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content)  # younger than the index
    assert open_source(said.spec).index.file.parent == tmp_path
    first = open_source(str(shard))
    assert 0 < len(first) < 40
    assert first.index.file.parent == tmp_path


def test_packing_twice_gives_the_same_bytes(folder, packed, tmp_path):
    again = pack(str(folder), tmp_path / "again", 50_000, QUIET)
    digests = [
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(root.iterdir())]
        for root in (packed[0], tmp_path / "again")
    ]
    assert digests[0] == digests[1]
    assert again.images == 40


def test_several_tasks_and_images_that_were_never_encoded(tmp_path):
    before = open_source("scenes:6", (32, 32))
    said = pack("scenes:6", tmp_path / "out", 10**6, QUIET)
    after = open_source(said.spec)
    assert list(after.classes) == list(before.classes)
    assert len(after.classes) > 1
    assert after.classes == before.classes
    for task, labels in before.labels.items():
        assert np.array_equal(labels, after.labels[task])
    assert set(said.maps) == set(before.maps)


def test_images_without_labels(folder, tmp_path):
    said = pack(str(folder / "red"), tmp_path / "out", 10**6, QUIET)
    assert open_source(said.spec).labels == {}
    assert len(open_source(said.spec)) == 20


def test_what_cannot_be_read_is_left_out_and_named(folder, tmp_path, monkeypatch, capsys):
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:6]):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(file.read_bytes())
    (tmp_path / "images/a/2.png").write_text("no image")
    (tmp_path / "images/a/4.png").unlink()
    (tmp_path / "images/a/4.png").symlink_to("nothing")
    status, said, _ = command(monkeypatch, capsys, "pack", str(tmp_path / "images"), str(tmp_path / "out"))
    assert status == 0
    assert "4 images in 1 shards" in said
    assert "2 left out" in said
    assert "a/2.png: not an image" in said
    assert f"next: openjepa pretrain --recipe NAME --data '{tmp_path / 'out'}/shard-000000.tar'" in said
    assert [line.split("\t")[0] for line in (tmp_path / "out/skipped.txt").read_text().splitlines()] == [
        "a/2.png",
        "a/4.png",
    ]
    assert len(open_source(str(tmp_path / "out"))) == 4


def test_parquet_is_packed_with_its_class_names(folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    make_parquet(tmp_path / "x.parquet", files, [int(f.parent.name == "red") for f in files], ["cold", "warm"])
    said = pack(str(tmp_path / "x.parquet"), tmp_path / "out", 10**6, QUIET)
    assert open_source(said.spec).classes == {"label": ["cold", "warm"]}


def test_mistakes_are_refused_in_one_line_and_leave_nothing(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.jpg").write_text("no image")
    out = str(tmp_path / "out")
    assert "exists and is not empty" in refused(monkeypatch, capsys, "pack", str(folder), str(tmp_path / "full"))
    assert "no such file or folder" in refused(monkeypatch, capsys, "pack", str(tmp_path / "none"), out)
    assert "none of its 1 images" in refused(monkeypatch, capsys, "pack", str(tmp_path / "bad"), out)
    assert "--shard-size" in refused(monkeypatch, capsys, "pack", str(folder), out, "--shard-size", "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "full"]


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(self, raw, labels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.Writer, "add", full)
    with pytest.raises(UserError, match="No space left on device"):
        pack(str(folder), tmp_path / "out", 10**6, QUIET)
    assert not any(tmp_path.iterdir())


def test_a_store_is_no_folder_of_this_machine(folder, monkeypatch, capsys):
    told = refused(monkeypatch, capsys, "pack", str(folder), "s3://bucket/packed")
    assert "is not a folder of this machine" in told
    assert not Path("s3:").exists()

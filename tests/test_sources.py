"""Claims about what a SPEC names: the same batches from every source, whoever makes them, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from openjepa.data.shards import expand_braces
from openjepa.data.sources import Source, open_source
from openjepa.data.stream import DataConfig, batches
from openjepa.errors import UserError
from tests.helpers import RED, encoded, make_parquet, make_shards, steps_of, whole


@pytest.fixture
def three_sources(folder, tmp_path) -> list[Source]:
    files = sorted(folder.rglob("*.png"))
    labels = [int(f.parent.name == "red") for f in files]
    make_parquet(tmp_path / "x.parquet", files, labels, ["blue", "red"])
    make_shards(tmp_path, files, labels)
    specs = (str(folder), str(tmp_path / "x.parquet"), str(tmp_path / "s-{00..01}.tar"))
    return [open_source(spec) for spec in specs]


def test_every_source_gives_the_same_batches(three_sources):
    for step in (0, 4, 5, 11):
        first, *others = [steps_of(source).batch(step) for source in three_sources]
        for other in others:
            assert torch.equal(first.images, other.images)
            assert torch.equal(first.masks.context, other.masks.context)


def test_every_source_knows_its_labels(three_sources):
    assert {tuple(s.labels["label"]) for s in three_sources} == {(0,) * 20 + (1,) * 20}
    assert three_sources[0].classes["label"] == three_sources[1].classes["label"] == ["blue", "red"]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_restarts_change_nothing(folder, workers):
    steps = steps_of(open_source(str(folder)))
    got = list(batches(steps, 3, 9, workers, pin=False))
    for step, batch in zip(range(3, 9), got, strict=True):
        assert torch.equal(batch.images, steps_of(steps.source).batch(step).images)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(folder):
    steps = steps_of(open_source(str(folder)))
    orders = [steps.order(e).copy() for e in (0, 1)]
    assert all(sorted(o) == list(range(40)) for o in orders)
    assert not np.array_equal(*orders)


def test_bad_images_are_named_and_replaced(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/red/00.png").write_bytes(b"")
    (tmp_path / "images/red/01.png").write_text("not an image")
    (tmp_path / "images/blue/05.png").write_bytes((folder / "blue/05.png").read_bytes()[:100])
    steps = steps_of(open_source(str(tmp_path / "images")))
    epoch = [steps.batch(s) for s in range(5)]
    assert {b.name for batch in epoch for b in batch.bad} == {"red/00.png", "red/01.png", "blue/05.png"}
    assert all(b.images.shape == (8, 3, 32, 32) for b in epoch)


def test_a_link_to_nothing_is_a_bad_image(folder, tmp_path):
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:16]):
        (tmp_path / f"{i:02}.png").write_bytes(file.read_bytes())
    (tmp_path / "16.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(str(tmp_path))
    assert source.fingerprint()
    steps = steps_of(source, data=DataConfig(batch_size=17))
    assert [b.name for b in steps.batch(0).bad] == ["16.png"]


def test_a_disk_that_fails_is_not_a_bad_image(folder, monkeypatch):
    source = open_source(str(folder))

    def fail(index):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(source, "read", fail)
    with pytest.raises(UserError, match="Input/output error"):
        steps_of(source).batch(0)


def test_names_that_are_no_text_can_be_printed(tmp_path):
    import os

    with open(os.fsencode(str(tmp_path)) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(RED, "PNG"))
    source = open_source(str(tmp_path))
    source.name(0).encode()
    assert isinstance(whole(source.read(0)), np.ndarray)


def test_only_labels_are_tasks(tmp_path):
    image = pa.array([{"bytes": encoded(RED, "PNG"), "path": None}] * 4)
    columns = {
        "image": image,
        "id": [0, 1, 2, 3],
        "width": [3, 3, 2, 1],
        "label": [0, 1, 1, 0],
        "fine_label": [-1, 0, 0, 1],
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({b"huggingface": b"{damaged"}), tmp_path / "x.parquet")
    assert set(open_source(str(tmp_path / "x.parquet")).labels) == {"label"}


def test_several_splits_in_one_folder_are_refused(three_sources, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes((tmp_path / "x.parquet").read_bytes())
    with pytest.raises(UserError, match="several splits"):
        open_source(str(folder))
    assert len(open_source(str(folder / "train*.parquet"))) == 40


def test_torchvision_splits_are_train_and_test(monkeypatch):
    import torchvision

    class Stub:
        def __init__(self, root, train=True, download=False):
            self.targets, self.classes = [int(train)] * 3, ["no", "yes"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    assert open_source("torchvision:CIFAR10").labels["label"][0] == 1
    assert open_source("torchvision:CIFAR10:test").labels["label"][0] == 0
    with pytest.raises(UserError, match="has the splits train and test"):
        open_source("torchvision:CIFAR10:tset")


def test_a_folder_of_nothing_but_damage_ends(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_text("no")
    with pytest.raises(UserError, match="images in a row cannot be read"):
        steps_of(open_source(str(tmp_path))).batch(0)


def test_a_worker_hands_on_the_users_mistake_in_one_line(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_text("no")
    with pytest.raises(UserError) as error:
        next(batches(steps_of(open_source(str(tmp_path))), 0, 3, 1, pin=False))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{tmp}/none", "no such file or folder"),
        ("{tmp}/empty", "no images in this folder"),
        ("{tmp}/x.parquet", "no such file"),
        ("{tmp}/s-{{0..3}}.tar", "no such file"),
        ("{tmp}/s-{{3..0}}.tar", "runs backwards"),
        ("{tmp}/notes.txt", "of a kind that is not read"),
        ("{tmp}/bad.parquet", "bad.parquet"),
        ("{tmp}/bad.tar", "bad.tar"),
        ("{tmp}/table.parquet", "no column"),
        ("://\0.parquet", "null byte"),
        ("{tmp}/" + 300 * "x", "File name too long"),
        ("~no-such-user/x", "home directory"),
        ("torchvision:clevr", "no such data set"),
        ("torchvision:CIFAR11", "did you mean 'CIFAR10'"),
        ("scenes:0", "give a number of scenes"),
        ("scenes:9-3", "give a number of scenes"),
        ("scenes:many", "give a number of scenes"),
    ],
)
def test_data_that_is_not_there_is_refused_in_one_line(tmp_path, spec, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.parquet").write_text("hello")
    (tmp_path / "bad.tar").write_text("hello" * 300)
    pq.write_table(pa.table({"a": [1.5]}), tmp_path / "table.parquet")
    with pytest.raises(UserError, match=says) as error:
        open_source(spec.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


def test_a_batch_larger_than_the_data_is_refused(folder):
    with pytest.raises(UserError, match="larger than the data set of 40 images"):
        steps_of(open_source(str(folder)), data=DataConfig(batch_size=64))


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]


def test_remote_shards_read_like_local_ones(three_sources, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for shard in ("s-00.tar", "s-01.tar"):
        memory.pipe(f"/bucket/{shard}", (tmp_path / shard).read_bytes())
    remote = open_source("memory://bucket/s-{00..01}.tar")
    assert len(remote) == 40
    assert remote.read(33) == three_sources[2].read(33)


def test_real_parquet_and_shards(real_images):
    cifar = open_source(str(real_images / "cifar10/test.parquet"))
    assert len(cifar) == 10_000
    assert cifar.classes["label"][3] == "cat"
    photographs = open_source(str(real_images / "imagenet-sample/shard-{0000..0003}.tar"))
    assert len(photographs) == 1000
    assert len(set(photographs.labels["label"])) == 1000
    assert whole(photographs.read(500), (32, 32)).std() > 5


def test_labels_without_a_name_are_refused(tmp_path):
    """A flipped byte of a compressed column, or metadata of another file (found by the long fuzz)."""
    (tmp_path / "a.png").write_bytes(encoded(RED, "PNG"))
    make_parquet(tmp_path / "x.parquet", [tmp_path / "a.png"] * 3, [0, 1, 2], ["a", "b"])
    with pytest.raises(UserError, match="'label' has label 2, and the file's metadata name 2 classes"):
        open_source(str(tmp_path / "x.parquet"))

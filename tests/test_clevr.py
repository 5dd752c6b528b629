"""Claims about CLEVR as it is unpacked: VTAB's labels and splits, images seen whole."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openjepa.data.clevr import SPLITS, count_and_distance, read_scenes
from openjepa.data.sources import open_source
from openjepa.errors import UserError


def clevr(root: Path, train: int = 20, val: int = 6) -> Path:
    """A small one: scene i of train has 3 + i % 8 objects, the nearest at a depth of 7.5 + i % 6 / 2."""
    for part, count in (("train", train), ("val", val)):
        (root / "images" / part).mkdir(parents=True)
        (root / "scenes").mkdir(exist_ok=True)
        scenes = []
        for i in range(count):
            name = f"CLEVR_{part}_{i:06}.png"
            Image.fromarray(np.full((32, 48, 3), i % 256, dtype=np.uint8)).save(root / "images" / part / name)
            depths = [7.5 + i % 6 / 2 + k for k in range(3 + i % 8)]
            objects = [{"pixel_coords": [1, 2, depth]} for depth in reversed(depths)]
            scenes.append({"image_filename": name, "objects": objects})
        file = root / "scenes" / f"CLEVR_{part}_scenes.json"
        file.write_text(json.dumps({"info": {"version": "1.0"}, "scenes": scenes}))
    return root


@pytest.mark.parametrize(
    ("depth", "distance"), [(5.0, 0), (8.0, 0), (8.01, 1), (8.5, 1), (9.7, 4), (10.0, 4), (10.1, 5)]
)
def test_classes_are_vtabs_at_ties_too(depth, distance):
    assert count_and_distance([12.0, depth, 11.0]) == {"count": 0, "distance": distance}
    assert count_and_distance([depth] * 10)["count"] == 7


def test_a_split_is_read_in_the_files_order(tmp_path):
    source = open_source(f"clevr:{clevr(tmp_path)}")
    assert len(source) == 20
    assert source.whole
    assert source.labels["count"].tolist() == [i % 8 for i in range(20)]
    assert source.labels["distance"].tolist() == [max(0, i % 6 - 1) for i in range(20)]
    assert len(source.classes["count"]) == 8
    assert len(source.classes["distance"]) == 6
    assert source.name(7) == "CLEVR_train_000007.png"
    with Image.open(tmp_path / "images" / "train" / source.name(7)) as image:
        assert np.asarray(image).max() == 7
    assert len(open_source(f"clevr:{tmp_path}:val")) == 6


def test_splits_are_vtabs(tmp_path):
    clevr(tmp_path, train=2000)
    sizes = {split: len(open_source(f"clevr:{tmp_path}:{split}")) for split in SPLITS}
    assert sizes == {"train": 2000, "val": 6, "vtab-train": 1800, "vtab-val": 200, "vtab-test": 6, "vtab-train800": 800,
                     "vtab-val200": 200, "vtab-train800val200": 1000}  # fmt: skip
    small = open_source(f"clevr:{tmp_path}:vtab-train800val200")
    assert small.name(799) == "CLEVR_train_000799.png"
    assert small.name(800) == "CLEVR_train_001800.png"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "scenes" / "CLEVR_train_scenes.json").unlink(), "No such file"),
        (lambda d: (d / "scenes" / "CLEVR_train_scenes.json").write_text("{"), "not a file of CLEVR's scenes"),
        (lambda d: (d / "scenes" / "CLEVR_train_scenes.json").write_text('{"scenes": [{}]}'), "not a file of CLEVR's"),
    ],
)
def test_what_is_not_clevr_is_refused(tmp_path, spoil, says):
    spoil(clevr(tmp_path))
    with pytest.raises(UserError, match=says):
        open_source(f"clevr:{tmp_path}")


def test_folders_and_splits_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_source(f"clevr:{tmp_path / 'none'}")
    with pytest.raises(UserError, match="name too long"):
        open_source("clevr:" + "x" * 300)
    clevr(tmp_path / "c")
    with pytest.raises(UserError, match="did you mean 'vtab-val'"):
        open_source(f"clevr:{tmp_path / 'c'}:vtab-vall")
    file = tmp_path / "c" / "scenes" / "CLEVR_val_scenes.json"
    file.write_text(json.dumps({"scenes": [{"image_filename": "a.png", "objects": [{"pixel_coords": [0, 0, 9]}]}]}))
    assert read_scenes(file) == [("a.png", [9.0])]
    with pytest.raises(UserError, match=r"a\.png has not 3 to 10 objects"):
        open_source(f"clevr:{tmp_path / 'c'}:val")

"""Claims about dense probes: maps follow their images, scores are the field's, heads find what is there to be found."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics import JaccardIndex

from openjepa.data.decode import with_pillow
from openjepa.data.sources import Source, open_source
from openjepa.errors import UserError
from openjepa.evaluate import dense
from openjepa.evaluate.dense import DepthConfig, SegmentConfig, SegmentKnnConfig, tiled, untiled
from openjepa.evaluate.features import Images, PixelFeatures, View
from openjepa.evaluate.patches import PatchFeed
from openjepa.evaluate.scores import IGNORED, confusions, depth_errors, mean_iou, segmentation
from openjepa.evaluate.subjects import tasks
from openjepa.evaluate.views import Augmented, Mapped, Maps

CPU = torch.device("cpu")


class Painted(Source):
    """Random pictures of 24x20 pixels whose pixels say their own class: 0 dark, 1 bright, 255 where red; and a depth."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 2, (count, 5, 6)).repeat(4, 1).repeat(4, 2)  # on the patches' own grid
        self.bright = blocks.astype(np.uint8)
        self.red = rng.random((count, 20, 24)) < 0.1
        self.labels, self.classes = {}, {}
        self.maps = {"brightness": ["dark", "bright"], "distance": None}

    def __len__(self) -> int:
        return len(self.bright)

    def read(self, index: int) -> np.ndarray:
        pixels = np.stack([60 + 140 * self.bright[index]] * 3, -1).astype(np.uint8)
        return np.where(self.red[index][..., None], np.array([255, 0, 0], dtype=np.uint8), pixels)

    def read_map(self, task: str, index: int) -> np.ndarray:
        if task == "distance":
            return np.where(self.red[index], 0, 2.0 + 6.0 * self.bright[index]).astype(np.float32)
        return np.where(self.red[index], IGNORED, self.bright[index]).astype(np.uint8)

    def name(self, index: int) -> str:
        return str(index)


VIEW, GRID = View((20, 24)), (5, 6)


def feeds(task: str, train: int = 60, test: int = 20) -> tuple[PatchFeed, PatchFeed]:
    extractor = PixelFeatures(VIEW, patch=4)
    return tuple(PatchFeed(extractor, s, Maps(s, task), CPU) for s in (Painted(train), Painted(test, seed=1)))


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize("kind", ["crop", "squash"])
def test_a_map_is_seen_through_the_same_view_as_its_image(kind):
    """Nearest pixels of a picture, cropped and flipped alike, would give the map that the picture says of itself."""
    source = Painted(30)
    views = Augmented(source, np.arange(30), View((40, 36)), kind, seed=0, epoch=3)
    pairs = Mapped(views, Maps(source, "brightness"))
    flipped = 0
    for i in range(30):
        _, found = pairs[i]
        pixels = with_pillow(source.read(i), views.choose(i), (40, 36), 3, "nearest")
        pixels = pixels[:, ::-1] if views.flips(i) else pixels
        own = np.where(pixels[..., 1] == 0, IGNORED, pixels[..., 1] > 100)
        assert (found.numpy() == own).mean() > 0.93  # a crop's edge may round to either side
        flipped += views.flips(i)
    assert 5 < flipped < 25


def test_whole_views_take_the_centre_of_map_and_image():
    source = Painted(3)
    image, found = Mapped(Images(source, range(3), View((16, 16))), Maps(source, "brightness"))[1]
    assert found.shape == (16, 16)
    clear = found != IGNORED
    assert ((image[1] > 120).long() == found)[clear].float().mean() > 0.8  # the image is interpolated, its map is not


def test_scenes_know_their_masks_and_depths():
    source = open_source("scenes:40", (64, 64))
    for i in range(0, 40, 8):
        shapes, depths = source.read_map("objects", i), source.read_map("depth", i)
        assert shapes.shape == depths.shape == (64, 64)
        assert shapes.max() <= 3
        near = depths[(shapes > 0)].min()
        # the nearest object's surface is a little nearer than its centre, by which its class is told
        limits = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, math.inf)
        distance = int(source.labels["distance"][i])
        assert limits[distance] - 1.0 < near < limits[distance + 1]
        ground = source.read(i).reshape(-1, 3)[shapes.ravel() == 0]
        grey = np.abs(ground.astype(int) - ground.mean(1, keepdims=True)).max(1) < 20
        assert grey.mean() > 0.9  # but for the pixels that share an edge with an object
    assert set(np.unique(source.read_map("objects", 0))) > {0}


def annotated(root: Path) -> Path:
    for name in ("images", "masks", "depth"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / "images" / f"{i}.jpg")
        Image.fromarray(rng.integers(0, 3, (20, 24), dtype=np.uint8)).save(root / "masks" / f"{i}.png")
        Image.fromarray(rng.integers(1, 9000, (20, 24)).astype(np.uint16)).save(root / "depth" / f"{i}.png")
    (root / "classes.txt").write_text("sky\ntree\nroad\n")
    return root


def test_a_folder_with_masks_and_depths_beside_its_images(tmp_path):
    source = open_source(str(annotated(tmp_path / "a")))
    assert len(source) == 4
    assert source.maps == {"segmentation": ["sky", "tree", "road"], "depth": None}
    assert source.labels == {}
    depths = np.asarray(Image.open(tmp_path / "a" / "depth" / "2.png"))
    assert np.allclose(source.read_map("depth", 2), depths / 1000)
    (task,) = tasks(source, source, "segmentation")
    assert (task.name, task.classes) == ("segmentation", ["sky", "tree", "road"])
    before = task.identity
    Image.fromarray(np.zeros((20, 24), dtype=np.uint8)).save(tmp_path / "a" / "masks" / "0.png")
    assert tasks(source, source, "segmentation")[0].identity != before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "classes.txt").unlink(), "masks need classes.txt"),
        (lambda d: (d / "classes.txt").write_text("one\n"), "names 1 classes"),
        (lambda d: (d / "masks" / "3.png").unlink(), r"masks/3\.png is missing, the answer for images/3\.jpg"),
        (lambda d: (d / "masks" / "0.png").write_bytes(b"x"), r"0\.png cannot be read"),
        (lambda d: (d / "classes.txt").write_text("a\nb\n"), r"has class 2: classes\.txt names 0 to 1"),
        (lambda d: Image.new("RGB", (24, 20)).save(d / "masks" / "0.png"), "has 3 channels: a map has one"),
    ],
)
def test_odd_annotations_are_refused_by_name(tmp_path, spoil, says):
    spoil(annotated(tmp_path / "a"))
    with pytest.raises(UserError, match=says):
        open_source(str(tmp_path / "a")).read_map("segmentation", 0)


def test_dense_protocols_need_their_maps(folder):
    plain, scenes = open_source(str(folder)), open_source("scenes:20", (32, 32))
    with pytest.raises(UserError, match="segmentation needs masks in both sets"):
        tasks(plain, scenes, "segmentation")
    with pytest.raises(UserError, match="depth needs depth in both sets"):
        tasks(scenes, plain, "depth")
    other = open_source("scenes:20-40", (32, 32))
    other.maps = {"objects": ["ground", "thing"], "depth": None}
    with pytest.raises(UserError, match="have other classes"):
        tasks(scenes, other, "segmentation")


# ---------------------------------------------------------------- scores


def test_segmentation_scores_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 5, (6, 16, 16), generator=generator)
    predicted = torch.where(torch.rand(maps.shape, generator=generator) < 0.6, maps, maps.roll(1, 1))
    maps[:, :3] = IGNORED
    found = confusions(predicted, maps, 5)
    assert found.sum() == (maps != IGNORED).sum()
    library = JaccardIndex("multiclass", num_classes=5, ignore_index=IGNORED, average="none")(predicted, maps)
    answer = segmentation(found, list("abcde"))
    assert answer.value == pytest.approx(float(library.mean()), abs=1e-6)
    assert answer.details["per_class"] == pytest.approx(library.tolist(), abs=1e-6)
    assert answer.interval[0] < answer.value < answer.interval[1]


def test_classes_that_never_occur_do_not_count():
    maps = torch.tensor([[[0, 0], [1, 1]]])
    assert mean_iou(confusions(maps, maps, 9).sum(0)) == 1.0
    wrong = torch.tensor([[[0, 0], [1, 7]]])  # a class that is not there, predicted
    assert mean_iou(confusions(wrong, maps, 9).sum(0)) == pytest.approx((1 + 0.5) / 2)


def test_depth_errors_by_hand():
    maps = torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[99.0, 99.0], [0.0, 99.0]]])
    predicted = torch.tensor([[[1.0, 3.0], [4.4, 7.0]], [[1.0, 1.0], [1.0, 1.0]]])
    errors = depth_errors(predicted, maps, far=10.0)
    assert errors[0].tolist() == pytest.approx([math.sqrt((1 + 0.16) / 3), (0.5 + 0.1) / 3, 2 / 3])
    assert errors[1].isnan().all()  # nothing known within reach


def test_tiles_come_back_as_the_map():
    maps = torch.arange(2 * 20 * 24).view(2, 20, 24)
    tiles = tiled(maps, GRID)
    assert torch.equal(tiles[0, 7], maps[0, 4:8, 4:8].flatten())
    assert torch.equal(untiled(tiles.flatten(0, 1), GRID, maps), maps)


# ---------------------------------------------------------------- probes


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_neighbours_vote_pixel_by_pixel_as_scikit_learn_would(metric):
    torch.manual_seed(0)
    features, tiles = torch.randn(300, 6), torch.randint(0, 3, (300, 4)).to(torch.uint8)
    queries = torch.randn(50, 6)
    bank = dense.Bank.__new__(dense.Bank)
    bank.mean, bank.std, bank.features, bank.tiles = torch.zeros(6), torch.ones(6), features, tiles
    found = bank.labels(queries, metric, [1, 7], 3)
    for k in (1, 7):
        for pixel in range(4):
            library = KNeighborsClassifier(k, metric="cosine" if metric == "cosine" else "euclidean", algorithm="brute")
            expected = library.fit(features, tiles[:, pixel]).predict(queries)
            assert (found[k][:, pixel].numpy() == expected).all()


def test_segmentation_by_neighbours_finds_what_pixels_say():
    data, test = feeds("brightness")
    result = dense.segment_knn(SegmentKnnConfig(), data, test, GRID, 2)
    assert mean_iou(result.statistics.sum(0)) > 0.95
    assert {entry["k"] for entry in result.sweep} == {1, 3, 10, 30}
    assert len(result.statistics) == 20
    few = dense.segment_knn(SegmentKnnConfig(bank=90), data, test, GRID, 2)
    assert few.chosen["bank"] <= 90


def test_a_linear_head_segments_and_tells_depth():
    data, test = feeds("brightness")
    config = SegmentConfig(lrs=(0.01,), min_steps=150, epochs=1)
    assert mean_iou(dense.segment_linear(config, data, test, GRID, 2).statistics.sum(0)) > 0.7
    data, test = feeds("distance")
    config = DepthConfig(lrs=(1e-4, 0.1), min_steps=200, epochs=1, bins=32)
    result = dense.depth_linear(config, data, test, GRID)
    assert result.chosen["far"] == 8.0
    assert result.chosen["lr"] == 0.1
    rmse, _, close = result.statistics.mean(0).tolist()
    assert rmse < 2.1  # one depth for all does 3.0; interpolation between neighbouring blocks costs most of the rest
    assert close > 0.25
    again = dense.depth_linear(config, data, test, GRID)
    assert torch.equal(result.statistics, again.statistics)


def test_the_test_set_does_not_choose():
    data, test = feeds("brightness")
    other = replace(test, source=Painted(20, seed=2))
    other = replace(other, answers=Maps(other.source, "brightness"))
    assert (
        dense.segment_knn(SegmentKnnConfig(), data, test, GRID, 2).sweep
        == dense.segment_knn(SegmentKnnConfig(), data, other, GRID, 2).sweep
    )


def test_nothing_to_learn_from_is_said():
    data, test = feeds("brightness")
    data.source.red[:] = True
    with pytest.raises(UserError, match="no labelled patch"):
        dense.segment_knn(SegmentKnnConfig(), data, test, GRID, 2)
    data, test = feeds("distance")
    data.source.red[:] = True
    with pytest.raises(UserError, match="know no depth"):
        dense.depth_linear(DepthConfig(), data, test, GRID)
    with pytest.raises(UserError, match="depth: lrs and decays"):
        DepthConfig(lrs=())
    with pytest.raises(UserError, match="near above 0"):
        DepthConfig(near=5.0, far=2.0)

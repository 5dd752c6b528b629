"""Claims about what scores of anomalies are worth: they are the field's, odd scenes are odd, and labels or masks say what is."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from openjepa.data.raycast import TEXTURES
from openjepa.data.scenes import compose, compose_odd
from openjepa.data.sources import open_source
from openjepa.errors import UserError
from openjepa.evaluate.anomalies import IGNORED, Levels, image_auroc
from openjepa.recipes.oddity import truth_of
from openjepa.recipes.surprise import PatchView
from tests.helpers import annotated

# ---------------------------------------------------------------- what scores are worth


def test_image_auroc_is_sklearns_with_ties():
    rng = np.random.default_rng(0)
    scores, odd = rng.integers(0, 9, 200).astype(np.float32), rng.random(200) < 0.3
    answer = image_auroc(scores + 2 * odd, odd)
    assert answer.value == pytest.approx(roc_auc_score(odd, scores + 2 * odd))
    assert answer.interval[0] < answer.value < answer.interval[1]


def planted(count: int = 12, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Noisy maps that are a little higher in one or two blobs of most images; some pixels do not count."""
    rng = np.random.default_rng(1)
    masks = np.zeros((count, size, size), dtype=np.uint8)
    for i in range(count - 3):
        masks[i, 4:10, 5:9] = 1
        if i % 2:
            masks[i, 20:22, 20:30] = 1
    maps = rng.normal(size=masks.shape).astype(np.float32) + masks
    masks[:, :, -1] = IGNORED
    return maps, masks


def levels(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    found = Levels.of(maps)
    for one, mask in zip(maps, masks, strict=True):
        found.add(one, mask)
    return {answer.metric: answer.value for answer in found.answers()}


def test_pixel_auroc_is_sklearns():
    maps, masks = planted()
    counted = masks != IGNORED
    assert levels(maps, masks)["pixel AUROC"] == pytest.approx(roc_auc_score(masks[counted], maps[counted]), abs=2e-3)


def test_pro_is_the_area_under_the_regions_mean_overlap():
    """Against thresholds one by one, as its paper has it (Bergmann et al., 2020)."""
    maps, masks = planted()
    points = []
    for threshold in np.quantile(maps, np.linspace(1, 0, 400)):
        taken = maps >= threshold
        shares = [
            taken[i][labelled == r].mean()
            for i, (labelled, count) in enumerate(ndimage.label(m == 1, np.ones((3, 3))) for m in masks)
            for r in range(1, count + 1)
        ]
        points.append((taken[masks == 0].mean(), np.mean(shares)))
    false, right = np.array(points).T
    ends = np.linspace(0, 0.3, 1000)
    assert levels(maps, masks)["PRO"] == pytest.approx(
        np.trapezoid(np.interp(ends, false, right), ends) / 0.3, abs=5e-3
    )


def test_perfect_and_reversed_maps_reach_the_ends_of_every_score():
    _, masks = planted()
    truth = (masks == 1).astype(np.float32) + np.random.default_rng(0).random(masks.shape, dtype=np.float32) / 10
    assert levels(truth, masks) == pytest.approx({"pixel AUROC": 1, "PRO": 1, "first guess": 1}, abs=5e-3)
    assert levels(-truth, masks) == pytest.approx({"pixel AUROC": 0, "PRO": 0, "first guess": 0}, abs=5e-3)


# ---------------------------------------------------------------- odd scenes


def test_odd_scenes_are_the_usual_ones_but_for_one_object(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path))
    usual, odd = open_source("scenes:40"), open_source("scenes:40:odd")
    assert 10 < odd.labels["odd"].sum() < 30
    assert odd.fingerprint() != usual.fingerprint()
    for k in range(40):
        mask = odd.read_map("odd", k)
        changed = (usual.read(k) != odd.read(k)).any(-1)
        assert mask.any() == odd.labels["odd"][k] == changed.any()
        assert changed[mask == 1].mean() > 0.7 if mask.any() else True
        edge = ndimage.binary_dilation(mask, np.ones((3, 3)))  # pixels that share an edge with it
        assert not changed[~edge].any()


def test_only_a_texture_tells_an_odd_scene_from_its_usual_self_and_all_textures_occur():
    found = set()
    for k in range(40):
        scene, odd = compose_odd(0, k)
        for i, (thing, usual) in enumerate(zip(scene.objects, compose(0, k).objects, strict=True)):
            assert (thing.texture > 0) == (i == odd)
            assert thing == replace(usual, texture=thing.texture)
            found.add(thing.texture)
    assert found == set(range(len(TEXTURES)))


@pytest.mark.parametrize("spec", ["scenes:10:even", "scenes:10:odd:odd", "scenes::od"])
def test_other_kinds_of_scenes_are_refused(spec):
    with pytest.raises(UserError, match="perhaps :odd"):
        open_source(spec)


# ---------------------------------------------------------------- what is odd


def test_masks_beside_images_say_what_is_odd_and_where(tmp_path):
    source = open_source(str(annotated(tmp_path / "a")))
    truth = truth_of(source, PatchView((32, 32)), None, None)
    assert truth.odd.tolist() == [True] * 4 + [False] * 6
    assert truth.masks(0).shape == (32, 32)
    assert 0 < truth.masks(0).mean() < 0.2
    assert not truth.masks(7).any()


def test_folders_say_what_is_odd_where_the_usual_one_is_named(folder):
    source, view = open_source(str(folder)), PatchView((32, 32))
    assert truth_of(source, view, None, None) is None
    assert truth_of(source, view, None, "blue").odd.tolist() == [False] * 20 + [True] * 20
    with pytest.raises(UserError, match=r"which class of 'label'.*blue, red"):
        truth_of(source, view, "label", None)
    with pytest.raises(UserError, match="there are label; did you mean 'label'"):
        truth_of(source, view, "labl", None)
    with pytest.raises(UserError, match="no labels or masks have such a class"):
        truth_of(source, view, None, "green")

"""Claims about `openjepa search`: it finds what brute force finds and what was planted, and refuses what cannot be asked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

import openjepa
from openjepa.data.sources import open_source
from openjepa.errors import UserError
from openjepa.evaluate.alike import groups, kth_similarity, near_pairs
from openjepa.evaluate.features import Images, View
from openjepa.recipes import searching
from openjepa.recipes.embedding import ABOUT, VERSION, Embedding, embed, new_parquet, schema_of
from openjepa.recipes.looking import Pictures, Region
from openjepa.recipes.searching import Table, build, duplicates, neighbours, outliers
from tests.helpers import command, encoded, refused

QUIET = Console(quiet=True)
SIZE, PATCH = (24, 40), 4  # of the trained run
CPU = torch.device("cpu")


def features_file(file: Path, vectors: np.ndarray, labels: np.ndarray | None = None, patches: int = 1) -> Path:
    """As `embed` writes it, of given features; every `patches` rows are one image's."""
    about = {
        "version": VERSION,
        "run": "nowhere",
        "step": 7,
        "network": "encoder",
        "weights": "0",
        "view": {"size": [8, 8 * patches], "channels": 3, "share": 1.0, "squash": False},
        "precision": "fp32",
        "layers": 1,
        "pool": "patches" if patches > 1 else "mean",
        "dim": vectors.shape[1],
        "dtype": str(vectors.dtype),
        "grid": [1, patches],
        "patch": 8,
        "data": "nothing",
        "images": len(vectors) // patches,
        "held": len(vectors) // patches,
        "fingerprint": "",
        "labels": {} if labels is None else {"label": ["cat", "dog"]},
    }
    ids = np.arange(len(vectors)) // patches
    columns = {"id": ids, "path": [f"{i}.png" for i in ids], "row": np.zeros(len(ids), np.int32)}
    columns |= {"col": (np.arange(len(ids)) % patches).astype(np.int32), "label": labels}
    columns["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    schema = schema_of(about)
    with new_parquet(file, schema.with_metadata({ABOUT: json.dumps(about)})) as writer:
        writer.write_table(pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema))
    return file


def scattered(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Features that share most of what they are, as those of images do: any two have a cosine above 0.9."""
    return (5 + np.random.default_rng(seed).normal(size=(count, dim))).astype(np.float32)


def whitened(vectors: np.ndarray, places: int = 1) -> np.ndarray:
    """Less the mean of each place, of unit variance in all directions that have any: [n, d]. By another way than the package."""
    rest = vectors.astype(np.float64).reshape(-1, places, vectors.shape[-1])
    rest = (rest - rest.mean(0)).reshape(len(vectors), -1)
    left, scale, _ = np.linalg.svd(rest, full_matrices=False)
    kept = min(max(8, len(vectors) // 10), int((scale**2 > 1e-6 * scale[0] ** 2).sum()))
    return left[:, :kept] * len(vectors) ** 0.5


def cosines(vectors: np.ndarray, to: np.ndarray) -> np.ndarray:
    return vectors @ to / np.linalg.norm(vectors, axis=1) / np.linalg.norm(to)


@pytest.fixture(scope="module")
def embedded(trained, folder, tmp_path_factory) -> dict[str, Table]:
    """Tables of the forty images, and of their patches."""
    root = tmp_path_factory.mktemp("embedded")
    for pool in ("mean", "patches"):
        embed(
            Embedding(run=str(trained), data=str(folder), out=root / f"{pool}.parquet", pool=pool, device="cpu"), QUIET
        )
        build(root / f"{pool}.parquet", root / pool)
    return {pool: Table(root / pool) for pool in ("mean", "patches")}


def patches_of(trained: Path, folder: Path) -> np.ndarray:
    """[40, rows, columns, D], by the encoder itself."""
    view = Images(open_source(str(folder)), range(40), View(SIZE))
    rows, columns = SIZE[0] // PATCH, SIZE[1] // PATCH
    return openjepa.load(trained)(torch.stack([view[i] for i in range(40)])).unflatten(1, (rows, columns)).numpy()


# ---------------------------------------------------------------- neighbours


def test_neighbours_are_those_of_brute_force(tmp_path):
    vectors = scattered(500)
    table = build(features_file(tmp_path / "f.parquet", vectors), tmp_path / "t")
    expected = cosines(whitened(vectors), whitened(vectors)[17])
    for asked in (table.vector(17), table.whiten(vectors[17:18])[0]):
        found = neighbours(table, asked, 20)
        assert [hit.id for hit in found] == (-expected).argsort()[:20].tolist()
        assert np.allclose([hit.score for hit in found], np.sort(expected)[::-1][:20], atol=1e-5)


def test_an_image_of_patches_is_found_once_by_its_nearest_patch(tmp_path):
    vectors = scattered(400)
    vectors[80:88] = vectors[83] + 0.1 * scattered(8, seed=1)  # all patches of image 10 come first
    table = build(features_file(tmp_path / "f.parquet", vectors, patches=8), tmp_path / "t")
    found = neighbours(table, table.whiten(vectors[83:84], np.array([3]))[0], 50)
    best = cosines(whitened(vectors, places=8), whitened(vectors, places=8)[83]).reshape(50, 8)
    assert [hit.id for hit in found] == (-best.max(1)).argsort().tolist()
    assert [hit.place[1] for hit in found] == best[[hit.id for hit in found]].argmax(1).tolist()
    assert np.allclose([hit.score for hit in found], best.max(1)[[hit.id for hit in found]], atol=1e-5)


def test_vectors_are_features_of_which_nothing_is_shared(tmp_path):
    scales = np.logspace(0, -2, 16)  # as those of images, which differ mostly in a few directions
    vectors = (scattered(1000) - 5) * scales + 2 * np.arange(16)
    twin = vectors[3] + np.random.default_rng(1).normal(size=16) * scales * 0.1
    vectors = np.concatenate([vectors, twin[None]]).astype(np.float32)
    assert np.sort(cosines(vectors, vectors[3]))[0] > 0.99
    table = build(features_file(tmp_path / "f.parquet", vectors), tmp_path / "t")
    _, found = table.all()
    assert torch.allclose(found.T @ found / len(found), torch.eye(16), atol=1e-3)
    first, second, third = neighbours(table, table.vector(3), 3)
    assert (first.id, second.id) == (3, 1000)
    assert third.score < 0.9 < second.score


def test_an_index_is_asked_in_a_large_table_and_finds_nearly_all(tmp_path, monkeypatch):
    monkeypatch.setattr(searching, "LARGE", 1000)
    centres = np.random.default_rng(1).normal(size=(40, 16)) * 3
    vectors = scattered(2000) + np.repeat(centres, 50, 0).astype(np.float32)
    table = build(features_file(tmp_path / "f.parquet", vectors), tmp_path / "t")
    assert [index.index_type for index in table.lance.list_indices()] == ["IvfFlat"]
    found = expected = 0
    for i in range(0, 2000, 100):
        near = (-cosines(whitened(vectors), whitened(vectors)[i])).argsort()[:10]
        found += len({hit.id for hit in neighbours(table, table.vector(i), 10)} & {*near.tolist()})
        expected += 10
    assert found > 0.95 * expected
    with pytest.raises(UserError, match="holds 2000 images"):
        neighbours(table, vectors[0], 2001)


def test_half_precision_finds_the_same(tmp_path):
    vectors = scattered(300).astype(np.float16)
    table = build(features_file(tmp_path / "f.parquet", vectors), tmp_path / "t")
    expected = cosines(whitened(vectors), whitened(vectors)[5])
    assert table.lance.schema.field("vector").type.value_type == pa.float16()
    assert [hit.id for hit in neighbours(table, table.vector(5), 3)] == (-expected).argsort()[:3].tolist()


def test_an_image_finds_itself_from_its_file_and_by_its_id(embedded, folder, monkeypatch, capsys):
    table = str(embedded["mean"].folder)
    words = ("search", "neighbours", table)
    _, by_file, _ = command(monkeypatch, capsys, *words, str(folder / "red/03.png"), "-k", "3", "--json")
    _, by_id, _ = command(monkeypatch, capsys, *words, "23", "-k", "3", "--json")
    file, number = json.loads(by_file), json.loads(by_id)
    assert file[0] == {"score": 1.0, "id": 23, "path": "red/03.png", "label": "red"}
    assert [hit["id"] for hit in file] == [hit["id"] for hit in number]
    _, printed, _ = command(monkeypatch, capsys, *words[:1], "neighbors", table, "23", "-k", "3")
    assert printed.splitlines()[0].split() == ["score", "id", "path", "label"]
    assert printed.splitlines()[1].split() == ["1.0000", "23", "red/03.png", "red"]
    assert len(printed.splitlines()) == 4


def test_neighbours_of_a_box_are_those_of_the_mean_of_its_patches(embedded, trained, folder, monkeypatch, capsys):
    patches = patches_of(trained, folder)
    every = patches.reshape(-1, patches.shape[-1])
    width, height = 40, 36  # of the files, whose central crop of 40 by 24 starts at row 6
    told = command(
        monkeypatch,
        capsys,
        *("search", "neighbours", str(embedded["patches"].folder), str(folder / "blue/07.png")),
        *("--box", f"8,{6 + 4},12,8", "-k", "40", "--json"),
    )[1]
    vectors = whitened(every, places=60).reshape(*patches.shape[:3], -1)
    asked = vectors[7, 1:3, 2:5].mean((0, 1))
    best = cosines(vectors.reshape(len(every), -1), asked).reshape(40, -1)
    assert width // PATCH == patches.shape[2]
    assert height - 12 == SIZE[0]
    found = json.loads(told)
    assert [hit["id"] for hit in found] == (-best.max(1)).argsort().tolist()
    assert [hit["row"] * 10 + hit["col"] for hit in found] == [int(best[hit["id"]].argmax()) for hit in found]


def test_a_patch_finds_itself_by_file_and_by_id(embedded, folder, monkeypatch, capsys):
    for image in (str(folder / "red/03.png"), "23"):
        words = ("search", "neighbours", str(embedded["patches"].folder), image, "--patch", "2,9", "-k", "1", "--json")
        (hit,) = json.loads(command(monkeypatch, capsys, *words)[1])
        assert hit == {"score": 1.0, "id": 23, "path": "red/03.png", "row": 2, "col": 9, "label": "red"}


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0, 6, 40, 24), (0, 6), (0, 10)),  # all that is seen
        ((0, 0, 40, 36), (0, 6), (0, 10)),  # more than that
        ((9, 7, 1, 1), (0, 1), (2, 3)),  # one pixel: the patch it lies in
        ((8, 10, 4, 4), (1, 2), (2, 3)),  # just a patch
        ((7, 9, 6, 6), (1, 2), (2, 3)),  # whose neighbours' centres lie outside
    ],
)
def test_a_box_means_the_patches_whose_centres_it_holds(box, rows, columns):
    inside = Region(box=box).patches((6, 10), View(SIZE).box(40, 36), (40, 36))
    expected = np.zeros((6, 10), bool)
    expected[slice(*rows), slice(*columns)] = True
    assert np.array_equal(inside, expected)


# ---------------------------------------------------------------- duplicates, outliers


def test_planted_duplicates_are_found_and_nothing_else(tmp_path):
    vectors = scattered(300)
    vectors[[40, 250, 7]] = vectors[100] + np.random.default_rng(2).normal(size=(3, 16)).astype(np.float32) * 0.02
    vectors[60] = vectors[200]
    labels = np.zeros(300, np.int64)
    labels[60] = 1
    table = build(features_file(tmp_path / "f.parquet", vectors, labels), tmp_path / "t")
    found = duplicates(table, 0.95, CPU)
    assert [[hit.id for hit in group] for group in found] == [[7, 40, 100, 250], [60, 200]]
    assert [hit.labels["label"] for hit in found[1]] == ["dog", "cat"]
    assert found[1][0].score == pytest.approx(1, abs=1e-6)
    assert found[0][1].score == pytest.approx(cosines(whitened(vectors), whitened(vectors)[7])[40], abs=1e-5)


def test_among_few_images_the_nearer_are_nearer_and_none_is_a_duplicate(tmp_path):
    """All directions scaled alike, seven images would all be as far apart; not scaled, one direction tells all."""
    vectors = scattered(40, dim=32)
    vectors[:, 0] += 30 * np.random.default_rng(1).normal(size=40)  # such as brightness
    for count in (7, 40):
        few = vectors[:count].copy()
        few[3] = few[0] + 0.2 * (few[5] - few[0])
        table = Table(build(features_file(tmp_path / f"{count}.parquet", few), tmp_path / f"{count}").folder)
        scores = {hit.id: hit.score for hit in neighbours(table, table.vector(0), count)}
        assert max(scores, key=lambda i: scores[i] if i else -1) == 3
        assert np.std([scores[i] for i in range(1, count) if i != 3]) > 0.05
        assert [[hit.id for hit in group] for group in duplicates(table, 0.95, torch.device("cpu"))] in ([], [[0, 3]])


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_and_copies_of_one_are_alike(tmp_path, count, monkeypatch, capsys):
    file = features_file(tmp_path / "f.parquet", np.repeat(scattered(1), count, 0))
    status, said, error = command(
        monkeypatch, capsys, "search", "duplicates", str(file), "--draw", str(tmp_path / "d.png"), "--json"
    )
    if count == 1:
        assert (status, json.loads(said), error) == (0, [], "nothing to draw\n")
    else:
        assert [[hit["id"] for hit in group] for group in json.loads(said)] == [[0, 1]]
    assert "give 1 or more" in refused(monkeypatch, capsys, "search", "duplicates", str(file), "-n", "0")
    assert "of the kind .png" in refused(
        monkeypatch, capsys, "search", "outliers", str(file), "--draw", str(tmp_path / "d")
    )


def test_pairs_and_neighbours_do_not_depend_on_the_tile(monkeypatch):
    vectors = torch.from_numpy(scattered(100) - 5)
    all_at_once = kth_similarity(vectors, 7), groups(100, near_pairs(vectors, 0.6))
    monkeypatch.setattr("openjepa.evaluate.alike.TILE", 9)
    assert torch.allclose(kth_similarity(vectors, 7), all_at_once[0])
    in_tiles = groups(100, near_pairs(vectors, 0.6))
    assert [group.tolist() for group in in_tiles] == [group.tolist() for group in all_at_once[1]]
    assert len(in_tiles) > 1
    units = torch.nn.functional.normalize(vectors, dim=1)
    expected = (units @ units.T).sort(dim=1, descending=True).values[:, 7]  # itself is the first
    assert torch.allclose(all_at_once[0], expected, atol=1e-6)


def test_what_a_chain_ties_is_one_group():
    pairs = [(np.array([0, 3]), np.array([1, 4])), (np.array([1]), np.array([2])), (np.array([4]), np.array([5]))]
    assert [group.tolist() for group in groups(8, pairs)] == [[0, 1, 2], [3, 4, 5]]


def test_planted_outliers_are_the_first(tmp_path):
    axes = np.concatenate([np.eye(8), -np.eye(8)]).astype(np.float32)
    vectors = 5 + np.repeat(axes, 20, 0) + 0.05 * (scattered(320, 8) - 5)
    vectors[[20, 120]] = 5 + axes[[0, 2]] + axes[[5, 7]]
    table = build(features_file(tmp_path / "f.parquet", vectors), tmp_path / "t")
    found = outliers(table, 5, 5, CPU)
    assert {hit.id for hit in found[:2]} == {20, 120}
    assert found[1].score < 0.75 < 0.9 < found[2].score
    assert len(outliers(table, 999, 5, CPU)) == 320  # all there are


def test_duplicate_files_are_found_by_the_command(trained, folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "images")
    shutil.copy(folder / "red/04.png", tmp_path / "images/blue/99.png")
    out = str(tmp_path / "f.parquet")
    command(monkeypatch, capsys, "embed", str(trained), "--data", str(tmp_path / "images"), "--out", out)
    draw = ("--draw", str(tmp_path / "d.png"))
    _, said, error = command(monkeypatch, capsys, "search", "duplicates", out, "--above", "0.999", *draw)
    assert said.splitlines()[0] == "1 groups of 2 images, alike to 0.999 or more"
    assert [line.split()[2:] for line in said.splitlines()[2:]] == [["blue/99.png", "blue"], ["red/04.png", "red"]]
    assert (tmp_path / "f.table/about.json").exists()  # made on the way
    assert Image.open(tmp_path / "d.png").size[0] > 300
    assert "drawn" in error


# ---------------------------------------------------------------- tables


def test_labels_names_and_what_made_them_survive(embedded, trained):
    table = embedded["mean"]
    (hit,) = neighbours(table, table.vector(3), 1)
    assert (hit.id, hit.path, hit.labels) == (3, "blue/03.png", {"label": "blue"})
    about = pq.read_schema(table.folder.parent / "mean.parquet").metadata[ABOUT]
    assert {**json.loads(about), "rows": 40} == table.about
    assert table.about["run"] == str(trained)
    assert np.allclose(table.vector(3), table.whiten(features(table.folder.parent / "mean.parquet")[3:4])[0], atol=1e-6)


def features(file: Path) -> np.ndarray:
    return np.stack(pq.read_table(file)["feature"].to_numpy())


def test_a_table_is_made_beside_its_features_once_and_never_for_others(embedded, tmp_path):
    file = features_file(tmp_path / "f.parquet", scattered(20))
    first = searching.opened(file)
    made = (first.folder / "about.json").stat().st_mtime_ns
    assert first.folder == tmp_path / "f.table"
    assert (searching.opened(file).folder / "about.json").stat().st_mtime_ns == made
    shutil.copy(embedded["mean"].folder.parent / "mean.parquet", file)
    with pytest.raises(UserError, match=r"f\.table is not of .*f\.parquet"):
        searching.opened(file)


def test_the_table_can_be_moved_and_opened_by_lancedb_itself(embedded, tmp_path):
    import lancedb

    shutil.copytree(embedded["mean"].folder, tmp_path / "moved")
    table = lancedb.connect(str(tmp_path / "moved")).open_table("features")
    assert table.schema.names == ["id", "path", "label", "vector"]
    assert table.search(Table(tmp_path / "moved").vector(9)).distance_type("cosine").limit(1).to_list()[0]["id"] == 9


def test_pictures_of_images_that_have_no_file(trained, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "f.parquet")
    command(monkeypatch, capsys, "embed", str(trained), "--data", "scenes:12", "--out", out, "--pool", "patches")
    words = ("search", "neighbours", out, "5", "--patch", "3,3", "-k", "4", "--draw", str(tmp_path / "n.png"))
    status, said, _ = command(monkeypatch, capsys, *words)
    assert status == 0
    assert said.splitlines()[1].split()[:5] == ["1.0000", "5", "scene", "5", "3"]
    drawn = np.asarray(Image.open(tmp_path / "n.png").convert("RGB"))
    assert drawn.std() > 20
    other = refused(monkeypatch, capsys, *words, "--data", "scenes:1-13")
    assert "has other images than those" in other


def test_a_hit_is_drawn_with_its_patch_framed(embedded):
    table = embedded["patches"]
    hit = searching.Hit(7, "blue/07.png", 0.5, {"label": "blue"}, (2, 5))
    tile = Pictures(table, None).tile(hit)
    assert tile.part == (0.5, 1 / 3, 0.1, 1 / 6)
    assert tile.lines == ("0.500 blue", "blue/07.png")
    assert tile.pixels.shape[1] >= 192


# ---------------------------------------------------------------- mistakes


def test_another_run_is_refused_by_its_weights(embedded, trained, folder, monkeypatch, capsys):
    words = ("search", "neighbours", str(embedded["mean"].folder), str(folder / "red/03.png"))
    earlier = min((trained / "checkpoints").glob("step-*"))
    told = refused(monkeypatch, capsys, *words, "--run", str(earlier))
    assert "was made with other weights" in told
    assert f"at step {int(earlier.name[5:])}" in told
    assert "no such file or folder" in refused(monkeypatch, capsys, *words, "--run", "gone")


def test_mistakes_are_refused_in_one_line(embedded, trained, folder, tmp_path, monkeypatch, capsys):
    means, patches = str(embedded["mean"].folder), str(embedded["patches"].folder)
    image = str(folder / "red/03.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "dot.png").write_bytes(encoded(Image.new("RGB", (3, 3)), "PNG"))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "empty").mkdir()

    def told(*words: str) -> str:
        return refused(monkeypatch, capsys, "search", *words)

    assert "no such table or file" in told("neighbours", str(tmp_path / "none"), image)
    assert "no such file" in told("neighbours", str(tmp_path / "none.parquet"), image)
    assert "is no table of" in told("outliers", str(tmp_path / "empty"))
    assert "it is no file of openjepa embed" in told(
        "build", str(tmp_path / "other.parquet"), "--out", str(tmp_path / "t")
    )
    assert "exists and is not empty" in told("build", str(tmp_path.joinpath(means)) + ".parquet", "--out", means)
    assert "nor the id of an image" in told("neighbours", means, str(tmp_path / "none.png"))
    assert "ids go up to 39" in told("neighbours", means, "40")
    assert "cannot be read as an image" in told("neighbours", means, str(tmp_path / "text.png"))
    assert "3x3 pixels, smaller than a patch of 4" in told("neighbours", means, str(tmp_path / "dot.png"))
    assert "-k 41" in told("neighbours", means, image, "-k", "41")
    assert "-k 0" in told("neighbours", means, image, "-k", "0")
    assert "is not in the image, of 40x36 pixels" in told("neighbours", patches, image, "--box", "30,0,11,5")
    assert "is not in the image" in told("neighbours", patches, image, "--box", "0,0,0,5")
    assert "its central crop 0,6,40,24" in told("neighbours", patches, image, "--box", "0,0,40,3")
    assert "holds whole images" in told("neighbours", means, image, "--patch", "1,1")
    assert "4 whole numbers" in told("neighbours", patches, image, "--box", "1,2,3")
    assert "rows are 0 to 5, columns 0 to 9" in told("neighbours", patches, image, "--patch", "6,0")
    assert "duplicates need a feature an image" in told("duplicates", patches)
    assert "a cosine is from -1 to 1" in told("duplicates", means, "--above", "95")
    assert "-k 40" in told("outliers", means, "-k", "40")
    assert "-n 0" in told("outliers", means, "-n", "0")
    assert "is no folder that can be written to" in told("outliers", means, "--draw", image + "/x.png")
    assert "--draw" in told("outliers", means, "--draw", str(tmp_path / "x.mp3"))
    assert "--data SPEC" in told("outliers", means, "--draw", str(tmp_path / "x.png"), "--data", str(tmp_path / "gone"))
    assert not (tmp_path / "t").exists()


def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch):
    file = features_file(tmp_path / "f.parquet", scattered(9))
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    with pytest.raises(UserError, match=r"pip install 'openjepa\[search\]'"):
        build(file, tmp_path / "t")
    assert not (tmp_path / "t").exists()

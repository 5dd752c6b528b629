"""Claims about `openjepa embed`: its features are those of evaluations, whole, named, and the same after any stop."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import openjepa
from openjepa.data.sources import open_source
from openjepa.errors import UserError
from openjepa.evaluate.features import EncoderFeatures, Images, View, extract
from openjepa.recipes import embedding
from openjepa.recipes.embedding import Embedding, describe, embed
from tests.helpers import command, make_parquet, refused

QUIET = Console(quiet=True)
SIZE = (24, 40)  # of the trained run's images


def features(file: Path) -> np.ndarray:
    column = pq.read_table(file)["feature"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def made(run: Path, data: object, out: Path, **more: object) -> embedding.Embedded:
    return embed(Embedding(run=str(run), data=str(data), out=out, device="cpu", **more), QUIET)


@pytest.fixture
def few(monkeypatch) -> None:
    """Blocks of 16 images in batches of 8: forty images are three blocks."""
    monkeypatch.setattr(embedding, "BLOCK", 16)
    monkeypatch.setattr(embedding, "BATCH", 8)


@pytest.mark.parametrize("layers", [1, 4])
def test_features_are_those_that_evaluations_use(trained, folder, tmp_path, layers, few):
    made(trained, folder, tmp_path / "f.parquet", layers=layers)
    view = View(SIZE)
    encoder = openjepa.load(trained)
    extractor = EncoderFeatures(encoder, view, torch.no_grad, "fp32", layers)
    theirs = extract(extractor, Images(open_source(str(folder)), range(40), view)).flatten(1)
    ours = features(tmp_path / "f.parquet")
    assert ours.shape == (40, 24 * min(layers, 2))  # its encoder has two blocks
    assert np.allclose(ours, theirs, atol=1e-6)


def test_compiled_blocks_have_the_same_features(trained, folder, tmp_path, few):
    made(trained, folder, tmp_path / "plain.parquet", precision="fp32")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made(trained, folder, tmp_path / "compiled.parquet", precision="fp32", compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert np.allclose(features(tmp_path / "plain.parquet"), features(tmp_path / "compiled.parquet"), atol=1e-5)


def test_patches_are_the_encoders_at_their_places_and_average_to_the_mean(trained, folder, tmp_path, few):
    made(trained, folder, tmp_path / "p.parquet", pool="patches")
    made(trained, folder, tmp_path / "m.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    rows, columns = SIZE[0] // 4, SIZE[1] // 4
    assert table["row"].to_pylist()[: rows * columns] == [row for row in range(rows) for _ in range(columns)]
    assert table["col"].to_pylist()[: rows * columns] == [*range(columns)] * rows
    assert table["id"].to_pylist() == [i for i in range(40) for _ in range(rows * columns)]
    patches = features(tmp_path / "p.parquet").reshape(40, rows * columns, -1)
    image = Images(open_source(str(folder)), [7], View(SIZE))[0]
    assert np.allclose(patches[7], openjepa.load(trained)(image[None])[0], atol=1e-6)
    assert np.allclose(patches.mean(1), features(tmp_path / "m.parquet"), atol=1e-5)


def test_names_and_labels_survive(trained, folder, tmp_path, few):
    made(trained, folder, tmp_path / "f.parquet")
    table, about = pq.read_table(tmp_path / "f.parquet"), describe(tmp_path / "f.parquet")
    assert table.schema.names == ["id", "path", "label", "feature"]
    assert table["id"].to_pylist() == [*range(40)]
    assert table["path"].to_pylist() == [f"{name}/{i:02}.png" for name in ("blue", "red") for i in range(20)]
    names = about["labels"]["label"]
    assert [f"{names[i]}/" for i in table["label"].to_pylist()] == [
        path[: path.index("/") + 1] for path in table["path"].to_pylist()
    ]
    hub = json.loads(table.schema.metadata[b"huggingface"])
    assert hub["info"]["features"]["label"]["names"] == ["blue", "red"]
    assert about["view"]["size"] == [*SIZE]
    assert (about["dim"], about["held"], about["network"]) == (24, 40, "target_encoder")
    assert about["step"] == max(int(path.name[5:]) for path in (trained / "checkpoints").glob("step-*"))


def test_several_sets_of_labels_and_one_of_a_name_that_is_taken(trained, tmp_path, monkeypatch):
    source = open_source("scenes:6", SIZE)
    source.labels["row"], source.classes = source.labels["count"], source.classes | {"row": ["a"] * 8}
    monkeypatch.setattr(embedding, "open_source", lambda spec, size: source)
    made(trained, "scenes:6", tmp_path / "f.parquet", pool="patches")
    table = pq.read_table(tmp_path / "f.parquet")
    assert {"count", "distance", "color", "shape", "label_row", "row"} <= {*table.schema.names}
    assert table["label_row"].to_pylist()[::60] == source.labels["count"].tolist()


def test_half_is_the_same_rounded(trained, folder, tmp_path):
    made(trained, folder, tmp_path / "f.parquet")
    made(trained, folder, tmp_path / "h.parquet", half=True)
    half = features(tmp_path / "h.parquet")
    assert half.dtype == np.float16
    assert np.array_equal(half, features(tmp_path / "f.parquet").astype(np.float16))


def test_a_killed_embed_goes_on_and_gives_the_same_bytes(trained, folder, tmp_path, few, monkeypatch):
    made(trained, folder, tmp_path / "whole.parquet")
    out = tmp_path / "killed.parquet"
    write = embedding.Blocks.write

    def killed(self, block, table, skipped):
        if block == 1:
            (self.folder / "block-000001.part").write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(self, block, table, skipped)

    monkeypatch.setattr(embedding.Blocks, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        made(trained, folder, out)
    assert not out.exists()
    monkeypatch.setattr(embedding.Blocks, "write", write)
    assert made(trained, folder, out).made == 24  # the first 16 were there
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.parquet", "whole.parquet"]


def test_one_killed_between_its_last_steps_is_whole(trained, folder, tmp_path, monkeypatch):
    out = tmp_path / "f.parquet"
    monkeypatch.setattr(embedding.shutil, "rmtree", lambda path: None)
    made(trained, folder, out)
    monkeypatch.undo()
    assert (tmp_path / "f.parquet.part").exists()
    assert made(trained, folder, out).made == 0
    assert not (tmp_path / "f.parquet.part").exists()


def test_workers_change_nothing(trained, folder, tmp_path, few):
    made(trained, folder, tmp_path / "none.parquet")
    made(trained, folder, tmp_path / "two.parquet", workers=2)
    assert (tmp_path / "none.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_images_that_cannot_be_read_are_left_out_and_named(trained, folder, tmp_path, few, monkeypatch, capsys):
    root = tmp_path / "images"
    for name in ("blue", "red"):
        (root / name).mkdir(parents=True)
        for file in sorted((folder / name).iterdir()):
            (root / name / file.name).write_bytes(file.read_bytes())
    (root / "blue/03.png").write_text("no image")
    for i in range(12, 20):  # a whole batch
        (root / f"red/{i:02}.png").write_bytes(b"")
    out = tmp_path / "f.parquet"
    status, said, _ = command(monkeypatch, capsys, "embed", str(trained), "--data", str(root), "--out", str(out))
    assert status == 0
    assert f"{out}: 31 images, 24 numbers a feature" in said
    assert "9 left out" in said
    assert "the first is blue/03.png: not an image" in said
    lines = (tmp_path / "f.parquet.skipped.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["blue/03.png", *(f"red/{i:02}.png" for i in range(12, 20))]
    assert pq.read_table(out)["id"].to_pylist() == [i for i in range(40) if i != 3 and i < 32]
    made(trained, folder, tmp_path / "all.parquet")
    kept = pq.read_table(out)["id"].to_numpy()
    assert np.allclose(features(out), features(tmp_path / "all.parquet")[kept], atol=1e-6)


def test_no_more_than_a_block_is_held(trained, folder, tmp_path, few, monkeypatch):
    held = []
    monkeypatch.setattr(
        embedding.Blocks,
        "write",
        lambda self, block, table, skipped: held.append(len(table)) or _write(self, block, table, skipped),
    )
    made(trained, folder, tmp_path / "f.parquet")
    assert held == [16, 16, 8]
    assert [pq.ParquetFile(tmp_path / "f.parquet").metadata.row_group(i).num_rows for i in range(3)] == held


_write = embedding.Blocks.write


def test_the_images_of_a_parquet_file_and_the_weights_of_an_export(trained, folder, tmp_path, monkeypatch, capsys):
    files = sorted(folder.rglob("*.png"))
    make_parquet(tmp_path / "x.parquet", files, [int(f.parent.name == "red") for f in files], ["cold", "warm"])
    made(trained, tmp_path / "x.parquet", tmp_path / "a.parquet")
    command(monkeypatch, capsys, "export", str(trained), "--format", "safetensors", "--out", str(tmp_path / "e"))
    made(tmp_path / "e", tmp_path / "x.parquet", tmp_path / "b.parquet", precision="fp32")
    assert np.array_equal(features(tmp_path / "a.parquet"), features(tmp_path / "b.parquet"))
    assert describe(tmp_path / "b.parquet")["step"] is None
    assert describe(tmp_path / "a.parquet")["labels"] == {"label": ["cold", "warm"]}


def test_mistakes_are_refused_in_one_line_and_leave_nothing(trained, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.jpg").write_text("no image")
    (tmp_path / "text.parquet").write_text("no Parquet")
    run, data = str(trained), ("--data", str(folder))
    before = sorted(tmp_path.rglob("*"))

    def told(*words: str) -> str:
        return refused(monkeypatch, capsys, "embed", *words)

    out = ("--out", str(tmp_path / "f.parquet"))
    assert "no such file or folder" in told(str(tmp_path / "none"), *data, *out)
    assert "no such file or folder" in told(run, "--data", str(tmp_path / "none"), *out)
    assert "ends in .parquet" in told(run, *data, "--out", str(tmp_path / "f"))
    assert "ends in .parquet" in told(run, *data, "--out", "s3://bucket/f.parquet")
    assert "--layers is 0" in told(run, *data, *out, "--layers", "0")
    assert "none of its 1 images can be read; x.jpg: not an image" in told(run, "--data", str(tmp_path / "bad"), *out)
    assert "is no folder that can be written to" in told(run, *data, "--out", str(tmp_path / "bad/x.jpg/f.parquet"))
    assert "text.parquet: " in told(run, *data, "--out", str(tmp_path / "text.parquet"))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_is_kept_or_refused_but_never_overwritten(trained, folder, tmp_path, few, monkeypatch, capsys):
    out = tmp_path / "f.parquet"
    words = ("embed", str(trained), "--data", str(folder), "--out", str(out))
    made(trained, folder, out)
    before = out.read_bytes()
    assert "as before" in command(monkeypatch, capsys, *words)[1]
    assert "layers 1, not 2" in refused(monkeypatch, capsys, *words, "--layers", "2")
    assert "network target_encoder, not encoder" in refused(monkeypatch, capsys, *words, "--network", "encoder")
    earlier = min((trained / "checkpoints").glob("step-*"))
    assert "other features (weights)" in refused(monkeypatch, capsys, words[0], str(earlier), *words[2:])
    assert "other features (images 40, not 20)" in refused(
        monkeypatch, capsys, "embed", str(trained), "--data", str(folder / "red"), "--out", str(out)
    )
    out.rename(tmp_path / "theirs.parquet")
    make_parquet(out, sorted(folder.rglob("*.png"))[:2], [0, 1], ["a", "b"])
    assert "it is no file of openjepa embed" in refused(monkeypatch, capsys, *words)
    assert (tmp_path / "theirs.parquet").read_bytes() == before


def test_half_of_other_features_is_not_gone_on_with(trained, folder, tmp_path, few, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedding.Blocks, "join", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(trained, folder, tmp_path / "f.parquet")
    with pytest.raises(UserError, match=r"f\.parquet\.part holds other features \(layers 1, not 2\)"):
        made(trained, folder, tmp_path / "f.parquet", layers=2)


def test_a_second_process_is_refused(trained, folder, tmp_path):
    from openjepa.engine.whole import taken

    (tmp_path / "f.parquet.part").mkdir()
    with taken(tmp_path / "f.parquet.part", ""), pytest.raises(UserError, match="another process is writing"):
        made(trained, folder, tmp_path / "f.parquet")


def test_a_full_disk_is_told_and_the_same_command_goes_on(trained, folder, tmp_path, few, monkeypatch, capsys):
    real = embedding.pq.ParquetWriter.write_table

    def full(self, table, *rest, **more):
        if table["id"][0].as_py() == 16:
            raise OSError(28, "No space left on device")
        real(self, table, *rest, **more)

    words = ("embed", str(trained), "--data", str(folder), "--out", str(tmp_path / "f.parquet"))
    monkeypatch.setattr(embedding.pq.ParquetWriter, "write_table", full)
    assert "No space left on device: see to the disk" in refused(monkeypatch, capsys, *words)
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "BLOCK", 16)
    assert made(trained, folder, tmp_path / "f.parquet").made == 24


def test_features_that_are_not_finite_are_named(trained, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "features_of", lambda e, images, pool: torch.full((len(images), 1, 24), 1e6))
    with pytest.raises(UserError, match=r"blue/00\.png are not finite: they are too large for float16"):
        made(trained, folder, tmp_path / "h.parquet", half=True)
    monkeypatch.setattr(embedding, "features_of", lambda e, images, pool: torch.full((len(images), 1, 24), torch.nan))
    with pytest.raises(UserError, match=r"blue/00\.png are not finite: the weights are damaged"):
        made(trained, folder, tmp_path / "f.parquet")

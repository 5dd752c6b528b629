"""What several test files need: images as bytes, commands as a user gives them, weights moved about."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from openjepa import cli
from openjepa.convert import formats
from openjepa.convert.names import Told
from openjepa.data.decode import Raw, decode
from openjepa.recipes.exchange import import_weights
from openjepa.recipes.recipe import Recipe

HEADS = Told(heads=2)  # of the tiny model, whose width no known size has


def whole(raw: Raw, size: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    return decode(raw, lambda w, h: (0, 0, w, h), size, channels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (8, 8), (200, 20, 20))


def make_parquet(path: Path, files: list[Path], labels: list[int], names: list[str]) -> None:
    image = pa.array([{"bytes": f.read_bytes(), "path": f.name} for f in files])
    table = pa.table({"image": image, "label": pa.array(labels)})
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    pq.write_table(table, path, row_group_size=7)


def make_shards(root: Path, files: list[Path], labels: list[int]) -> None:
    half = len(files) // 2
    for shard in range(2):
        with tarfile.open(root / f"s-{shard:02}.tar", "w") as tar:
            for i in range(shard * half, shard * half + half):
                for name, data in (
                    (f"{i:06}{files[i].suffix}", files[i].read_bytes()),
                    (f"{i:06}.cls", str(labels[i]).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def command(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """A command of openjepa: its exit status, and what it said."""
    monkeypatch.setattr(sys, "argv", ["openjepa", *words])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def refused(monkeypatch, capsys, *words: str) -> str:
    """The one line that a command refuses a mistake with."""
    status, _, error = command(monkeypatch, capsys, *words)
    assert status == 2
    assert len(error.splitlines()) == 1, error
    return error


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def imported(source: object, out: Path, base: Recipe | None = None, told: Told = HEADS, **values: str) -> Path:
    import_weights(formats.read(str(source), told), str(source), out, base, values)
    return out

"""What several test files need: images as bytes, commands as a user gives them, weights moved about."""

from __future__ import annotations

import io
import json
import socket
import struct
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from openjepa import cli
from openjepa.convert import formats
from openjepa.convert.names import Told
from openjepa.data.augment import AugmentConfig
from openjepa.data.decode import Raw, decode
from openjepa.data.sources import Source, open_source
from openjepa.data.stream import DataConfig, Steps, Views
from openjepa.decoder.rcdm import RCDMConfig
from openjepa.engine.checkpoint import checkpoints
from openjepa.errors import UserError
from openjepa.masking import MaskingConfig, sample_share
from openjepa.recipes.exchange import import_weights
from openjepa.recipes.recipe import Recipe

HEADS = Told(heads=2)  # of the tiny model, whose width no known size has
PAINTER = RCDMConfig(size=8, width=8, multipliers=(1, 2), blocks=1, attention=(4,))  # a tiny decoder
PAINTS = {  # how it is trained
    "data.batch_size": "8",
    "schedule.epochs": "2",
    "schedule.ema": "0.5,0.5",
    "machine.keep": "9",
    "machine.checkpoint_every": "0.4",
    "monitors.log_every": "1",
    "precision": "fp32",
}


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


def make_tar(path, *files, form=tarfile.USTAR_FORMAT, pax=None):
    """An archive of (name, content), or of (name, content, changes to its header)."""
    with tarfile.open(path, "w", format=form, pax_headers=pax) as archive:
        for name, content, *changes in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (changes[0] if changes else {}).items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


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


def steps_of(source: Source, **changes) -> Steps:
    settings = {
        "data": DataConfig(batch_size=8),
        "augment": AugmentConfig(),
        "masking": MaskingConfig(),
        "seed": 0,
    } | changes
    views = Views((settings["augment"],), (32, 32), 3, partial(sample_share, settings["masking"], (8, 8)))
    return Steps(source, settings["data"], views, settings["seed"])


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of a run's newest checkpoint, every network's."""
    return load_file(checkpoints(run)[-1].path / "weights.safetensors")


def logged(run: Path) -> list[dict]:
    """What a run has written of itself so far."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def refusal(spec: str) -> str:
    """The one line that a SPEC is refused with."""
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert "\n" not in str(error.value)
    return str(error.value)


def annotated(root: Path, sizes: tuple[int, int] = (40, 36)) -> Path:
    """Ten images, of which four hold a bright square; masks beside them."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels, mask = rng.integers(90, 110, (*sizes, 3)), np.zeros(sizes, dtype=np.uint8)
        if i < 4:
            pixels[10:20, 12:22], mask[10:20, 12:22] = 255, 2
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("good\nscratch\nhole\n")
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")

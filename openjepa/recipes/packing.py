"""Any source becomes tar shards with an index, which open at once and read at random from any store."""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from openjepa.data.decode import BadImage, Raw, decode
from openjepa.data.index import ABOUT_NAME, INDEX_NAME, About, write_index
from openjepa.data.sources import open_source
from openjepa.data.tar import BLOCK
from openjepa.engine.whole import new_folder, refuse_full, refuse_unwritable
from openjepa.errors import UserError, first_line

SKIPPED_NAME = "skipped.txt"
ENDINGS = {b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"II": "tif", b"MM": "tif"}  # by first bytes; else jpg


@dataclass(frozen=True)
class Packed:
    """images: how many were packed. skipped: names and reasons of the others. maps: dense tasks, which shards cannot hold."""

    images: int
    shards: int
    maps: list[str]
    skipped: list[str]
    spec: str


def pack(spec: str, out: Path, shard_bytes: int, console: Console) -> Packed:
    """Write OUT/shard-*.tar of about shard_bytes each, ABOUT_NAME and INDEX_NAME; the same source gives the same bytes.

    Encoded images are copied as they are, others become PNG. What cannot be decoded is left out and named in SKIPPED_NAME.
    Raises UserError; then OUT is not there.
    """
    if "://" in str(out) or re.match(r"\w+:/", str(out)):
        raise UserError(f"--out {out} is not a folder of this machine: pack here, then copy the folder as it is")
    refuse_full(out)
    refuse_unwritable(out)
    source = open_source(spec)
    skipped: list[str] = []
    with new_folder(out) as folder:
        shards = Writer(folder, shard_bytes)
        reads = source.reads(range(len(source)))
        progress = track(reads, "packing", len(source), console=console, transient=True, disable=console.quiet)
        for index, read in enumerate(progress):
            try:
                raw = encoded(read())
                decode(raw, lambda w, h: (0, 0, w, h), (8, 8))
            except (BadImage, FileNotFoundError, PermissionError) as error:
                skipped.append(f"{source.name(index)}\t{first_line(error)}")
                continue
            except OSError as error:
                raise UserError(f"cannot read {source.name(index)}: {first_line(error)}") from error
            shards.add(raw, {task: int(labels[index]) for task, labels in source.labels.items()})
        shards.close()
        if not shards.images:
            raise UserError(f"data '{spec}': none of its {len(source)} images can be read; {skipped[0]}")
        (folder / ABOUT_NAME).write_text(About(source.classes, source.whole).to_json())
        if skipped:
            (folder / SKIPPED_NAME).write_text("".join(f"{line}\n" for line in skipped))
        files = [str(file) for file in shards.files]
        write_index(files, [file.stat().st_size for file in shards.files], list(source.classes), folder / INDEX_NAME)
    first, last = (file.stem.rpartition("-")[2] for file in (shards.files[0], shards.files[-1]))
    number = first if first == last else f"{{{first}..{last}}}"
    return Packed(shards.images, len(files), list(source.maps), skipped, f"{out}/shard-{number}.tar")


def encoded(raw: Raw) -> bytes:
    """An image's bytes: its own if it has any, else those of a PNG."""
    if isinstance(raw, bytes):
        return raw
    buffer = io.BytesIO()
    (Image.fromarray(raw.squeeze()) if isinstance(raw, np.ndarray) else raw).save(buffer, "PNG")
    return buffer.getvalue()


class Writer:
    """Numbered samples in numbered shards: NNNNNNNNN.jpg, and .cls for one task of labels or .json for several."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.files: list[Path] = []
        self.images, self._bytes = 0, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, raw: bytes, labels: dict[str, int]) -> None:
        ending = next((ending for begins, ending in ENDINGS.items() if raw.startswith(begins)), "jpg")
        members = {ending: raw}
        if len(labels) == 1:
            members["cls"] = str(next(iter(labels.values()))).encode()
        elif labels:
            members["json"] = json.dumps(labels).encode()
        taken = sum(BLOCK + -(-len(content) // BLOCK) * BLOCK for content in members.values())
        if self._tar is None or self._bytes + taken > self.shard_bytes:
            self.close()
            self.files.append(self.folder / f"shard-{len(self.files):06}.tar")
            self._tar, self._bytes = tarfile.open(self.files[-1], "w", format=tarfile.USTAR_FORMAT), 0  # noqa: SIM115
        for name, content in members.items():
            about = tarfile.TarInfo(f"{self.images:09}.{name}")  # of no time and nobody
            about.size = len(content)
            self._tar.addfile(about, io.BytesIO(content))
        self.images, self._bytes = self.images + 1, self._bytes + taken

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()

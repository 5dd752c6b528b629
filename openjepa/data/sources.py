"""Where images come from: what a source is, which one a SPEC names, and the plainest of them, a folder.

A source is a numbered list of images. What `read` returns is still encoded; order, crops and batches are made
elsewhere and look the same whatever the source, so the same images give the same run.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from openjepa.data.decode import MAX_BYTES, BadImage, Raw
from openjepa.errors import UserError, first_line, printable

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
SPLIT = re.compile(r"train|test|validation|valid|val")  # what names of Parquet files begin with


class Source:
    """A numbered list of images with their labels, if any.

    labels: for each task, int64 [len]. classes: for each task, the class names. maps: for each dense task, the class names,
    or None for depths. whole: images must be seen whole, as objects at their borders count.
    """

    labels: dict[str, np.ndarray]
    classes: dict[str, list[str]]
    maps: Mapping[str, list[str] | None] = MappingProxyType({})
    whole: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Raw:
        """The index-th image, encoded (bytes) or not (Pillow image, uint8 array).

        Raises BadImage or OSError for one that cannot be had, UserError where the whole source is at fault.
        """
        raise NotImplementedError

    def reads(self, indices: Iterable[int]) -> Iterator[Callable[[], Raw]]:
        """`read` of each index, to be called in their order: a source far away is ahead of who asks."""
        return (partial(self.read, int(index)) for index in indices)

    def read_map(self, task: str, index: int) -> np.ndarray:
        """A dense task's answer for the index-th image, upright, of any size.

        Classes in uint8 [H, W], 255 where there is none; or depths in float32 [H, W], 0 where it is not known.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call the image in a log."""
        raise NotImplementedError

    def stamps(self) -> list[str]:
        """What changes when the contents of any of its files do, known without reading them; empty where nothing can change."""
        return []

    def fingerprint(self, probes: int = 64) -> str:
        """A short hash of the length, the labels and some evenly spaced images."""
        digest = hashlib.blake2b(str(len(self)).encode(), digest_size=8)
        for task in sorted(self.labels):
            digest.update(task.encode())
            digest.update(np.ascontiguousarray(self.labels[task], "<i8").data)
        for index in np.linspace(0, len(self) - 1, min(probes, len(self))).astype(int):
            try:
                raw = self.read(int(index))
            except (BadImage, OSError):  # training will name it and go on
                raw = b"unreadable"
            digest.update(raw if isinstance(raw, bytes) else np.asarray(raw).tobytes())
        return digest.hexdigest()


def first_use(source: Source) -> None:
    """What a source makes on first use is made here and now, once, and not by every worker."""
    with contextlib.suppress(OSError, BadImage):
        source.read(0)


def open_source(spec: str, image_size: tuple[int, int] = (64, 64)) -> Source:
    """Open what a SPEC names. image_size (height, width): the size that `scenes` renders at.

    Raises UserError in one line when there is nothing usable there.
    """
    kind, _, rest = spec.partition(":")
    if kind == "scenes":
        from openjepa.data.scenes import Scenes

        return Scenes.from_spec(rest, image_size)
    if kind == "clevr":
        from openjepa.data.clevr import Clevr

        return Clevr(rest)
    if kind == "hf":
        from openjepa.data.parquet import from_hub

        return from_hub(rest)
    if kind == "torchvision":
        from openjepa.data.torchvision import TorchvisionSource

        return TorchvisionSource(rest)
    path, there = local_path(spec)
    if not path.is_dir() and spec.endswith(".tar"):
        from openjepa.data.shards import Shards

        return Shards.from_spec(spec)
    if not path.is_dir() and spec.endswith(".parquet"):
        from openjepa.data.parquet import ParquetSource

        return ParquetSource.from_files(expand_local(spec))
    if not there:
        hint = " (a SPEC is a folder, FILE.parquet, shard-{0000..0009}.tar, hf:NAME, torchvision:NAME or scenes)"
        raise UserError(f"data '{spec}': no such file or folder{hint}")
    if path.is_file():
        raise UserError(f"data '{spec}' is a file of a kind that is not read: give a folder, *.parquet or *.tar")
    if (path / "images").is_dir() and any((path / name).is_dir() for name in ("masks", "depth")):
        from openjepa.data.annotated import Annotated

        return Annotated(path)
    if not (images := list(walk(path))):
        parquet = sorted(path.glob("**/*.parquet"))
        splits = {match[0] for file in parquet if (match := SPLIT.match(file.name))}
        if len(splits) > 1:
            names = ", ".join(sorted(splits))
            raise UserError(
                f"data '{spec}' holds several splits ({names}): give one, such as '{spec}/**/train*.parquet'"
            )
        if parquet:
            from openjepa.data.parquet import ParquetSource

            return ParquetSource.from_files([str(file) for file in parquet])
        if shards := sorted(path.glob("*.tar")):
            from openjepa.data.shards import Shards

            return Shards([str(file) for file in shards])
        raise UserError(f"data '{spec}': no images in this folder (looked for {', '.join(sorted(EXTENSIONS))})")
    return Folder(path, images)


def local_path(spec: str) -> tuple[Path, bool]:
    """The path that a SPEC is, and whether there is something. Raises UserError for what can be none."""
    try:
        path = Path(spec).expanduser()
        return path, path.exists()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long, with a zero byte, of an unknown user, closed to this one
        raise UserError(f"data '{spec}': {first_line(error)}") from error


# ---------------------------------------------------------------- a folder


class Folder(Source):
    """Image files, flat or nested; the first level of sub-folders are the classes."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root, self.files = str(root), files
        tops = [file.split(os.sep, 1)[0] if os.sep in file else None for file in files]
        self.labels, self.classes = {}, {}
        if all(top is not None for top in tops):
            names = sorted({str(top) for top in tops})
            number = {name: i for i, name in enumerate(names)}
            self.labels["label"] = np.array([number[str(top)] for top in tops], dtype=np.int64)
            self.classes["label"] = names

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self.root, self.files[index]))

    def name(self, index: int) -> str:
        return printable(self.files[index])

    def stamps(self) -> list[str]:
        return [stamp(os.path.join(self.root, file)) for file in self.files]


def walk(root: Path) -> Iterator[str]:
    """Image files below root, relative to it, sorted; hidden files and looping links left out."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith("."):
                yield os.path.relpath(os.path.join(folder, file), root)


# ---------------------------------------------------------------- files


def read_file(path: str) -> bytes:
    """A whole file. Raises BadImage for a pipe or a device, which may never end, and above MAX_BYTES."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link to itself, a socket
            raise BadImage("not a file") from error
        raise
    with open(descriptor, "rb", buffering=0) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise BadImage("not a file")
        refuse_large(about.st_size)
        return file.read()


def refuse_large(size: int) -> None:
    """Raises BadImage for an encoded image of more than MAX_BYTES."""
    if size > MAX_BYTES:
        raise BadImage(f"{size} bytes are more than the limit of {MAX_BYTES}")


def expand_local(spec: str) -> list[str]:
    """A local path or glob to existing files, sorted; URLs pass through."""
    if "://" in spec:
        return [spec]
    path = os.path.expanduser(spec)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"data '{spec}': no such file")
    return files


def stamp(file: str | Path) -> str:
    """A file's size and time of change."""
    about = os.stat(file)
    return f"{about.st_size} {about.st_mtime_ns}"


def cache_folder() -> Path:
    """Where derived files may lie: $OPENJEPA_CACHE, or ~/.cache/openjepa."""
    folder = Path(os.environ.get("OPENJEPA_CACHE", "~/.cache/openjepa")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the cache {folder} ({error.strerror}): set OPENJEPA_CACHE") from error
    return folder

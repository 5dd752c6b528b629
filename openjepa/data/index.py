"""Where each image of a set of shards lies, in one file that is mapped into memory: a set of any size takes none.

The file: MAGIC, the length of the header in 8 bytes, the header (JSON: shards, images, tasks), then from multiples of 64 bytes
SAMPLE [images], labels int64 [images, tasks], and the names, a line each. It lies beside the shards if `openjepa pack` wrote
it, else in the cache under a hash of the shards' names, sizes and times.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openjepa.data.sources import EXTENSIONS, cache_folder
from openjepa.data.store import AT_ONCE, about, ahead, copy, is_remote, patiently, read_range, read_small
from openjepa.data.tar import Damaged, Read, members
from openjepa.errors import UserError, first_line, printable

MAGIC = b"openjepa index 1"
SAMPLE = np.dtype(
    [("offset", "<i8"), ("size", "<i4"), ("shard", "<i4"), ("name", "<i8")]
)  # name: where its line begins
LABEL = np.dtype("<i8")
INDEX_NAME, ABOUT_NAME = "openjepa.index", "openjepa.json"  # beside the shards
MOST_CLASSES = 2**20  # a larger number is an identity and no class
LARGEST_LABEL = 2**20  # bytes of a .cls or .json
LARGEST_ABOUT = 2**26  # bytes
UNLABELLED = -1


@dataclass(frozen=True)
class About:
    """What ABOUT_NAME beside packed shards says: the class names of each task, and whether images must be seen whole."""

    classes: dict[str, list[str]]
    whole: bool = False

    def to_json(self) -> str:
        return json.dumps({"classes": self.classes, "whole": self.whole}, indent=1) + "\n"


def read_about(folder: str) -> About | None:
    """Raises UserError if the file is there and says something else."""
    file = posixpath.join(folder, ABOUT_NAME)
    if (content := read_small(file, LARGEST_ABOUT)) is None:
        return None
    try:
        said = json.loads(content)
        classes, whole = said["classes"], said["whole"]
        lists = [isinstance(names, list) and all(isinstance(name, str) for name in names) for names in classes.values()]
        if not all(lists) or not isinstance(whole, bool):
            raise ValueError("class names are lists of texts, `whole` is true or false")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({first_line(error)}): make it anew with openjepa pack") from error
    return About(classes, whole)


class Index:
    """An index file, mapped. Raises UserError where it is damaged."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with open(file, "rb") as handle:
                header, start = read_header(handle)
            self.shards: list[list[Any]] = header["shards"]
            self.tasks: list[str] = header["tasks"]
            count = header["images"]
            labels = aligned(start + count * SAMPLE.itemsize)
            names = aligned(labels + count * len(self.tasks) * LABEL.itemsize)
            shape = (count, len(self.tasks))
            self.samples = np.asarray(np.memmap(file, SAMPLE, "r", start, (count,)))
            self.labels = (
                np.asarray(np.memmap(file, LABEL, "r", labels, shape)) if self.tasks else np.empty(shape, LABEL)
            )
            self.names = np.asarray(np.memmap(file, np.uint8, "r", names))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({first_line(error)}): remove it, it is made anew") from error

    def name(self, index: int) -> str:
        begin = int(self.samples["name"][index])
        end = int(self.samples["name"][index + 1]) if index + 1 < len(self.samples) else len(self.names)
        return printable(bytes(self.names[begin:end]).decode(errors="backslashreplace").rstrip("\n"))


def read_header(handle: Any) -> tuple[dict[str, Any], int]:
    """Of an index file, and where the samples begin. Raises ValueError."""
    if handle.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is no index of this version")
    length = int.from_bytes(handle.read(8), "little")
    if length > LARGEST_ABOUT:
        raise ValueError("its header is too long")
    header = json.loads(handle.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, aligned(len(MAGIC) + 8 + length)


def aligned(offset: int) -> int:
    return -(-offset // 64) * 64


def open_index(urls: list[str], classes: About | None) -> Index:
    """The index of some shards: that beside them, or that in the cache, which is made if need be. Raises UserError."""
    facts = [found() for found in ahead((lambda url=url: about(url)) for url in urls)]  # type: ignore[misc]
    tasks = list(classes.classes) if classes else ["label"]
    expected = [[posixpath.basename(url), size] for url, (size, _) in zip(urls, facts, strict=True)]
    beside = posixpath.join(folder_of(urls[0]), INDEX_NAME)
    one_place = len({folder_of(url) for url in urls}) == 1
    if one_place and not is_remote(beside) and younger(beside, urls):
        index = Index(Path(beside))
        if index.shards == expected and index.tasks == tasks:
            return index
    names = [url if is_remote(url) else os.path.abspath(url) for url in urls]
    key = json.dumps([MAGIC.decode(), names, [changes for _, changes in facts], tasks])
    file = (
        cache_folder()
        / f"shards-{hashlib.blake2b(key.encode(errors='surrogateescape'), digest_size=12).hexdigest()}.index"
    )
    if not file.exists():
        with one_at_a_time(file.with_suffix(".lock")):
            if not file.exists():
                part = file.with_suffix(f".{os.getpid()}.part")
                try:
                    if not (one_place and is_remote(beside) and fetched(beside, part, expected, tasks)):
                        write_index(urls, [size for size, _ in facts], tasks, part)
                    part.rename(file)
                except OSError as error:
                    raise UserError(f"cannot write {file}: {error.strerror or error}") from error
                finally:
                    part.unlink(missing_ok=True)
    return Index(file)


def folder_of(url: str) -> str:
    return posixpath.dirname(url)


def younger(file: str, than: list[str]) -> bool:
    """Whether a file is there and was written after all others."""
    try:
        return os.stat(file).st_mtime_ns >= max(os.stat(other).st_mtime_ns for other in than)
    except OSError:
        return False


def fetched(url: str, part: Path, expected: list[list[Any]], tasks: list[str]) -> bool:
    """Copy a remote index of these very shards; False where there is none."""
    shards = sum(size for _, size in expected)  # of which a sample takes more than of the index
    if not copy(url, part, aligned(shards) + LARGEST_ABOUT):
        return False
    index = Index(part)
    return index.shards == expected and index.tasks == tasks


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Of the processes of one machine, the first makes what the others wait for."""
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: each makes it, all make the same
            yield
            return
        yield


# ---------------------------------------------------------------- making one


def write_index(urls: list[str], sizes: list[int], tasks: list[str], out: Path) -> None:
    """Read the headers of all shards and write what lies where; a few shards at a time are in memory. Raises UserError."""
    with tempfile.TemporaryFile(dir=out.parent) as samples, tempfile.TemporaryFile(dir=out.parent) as labels, \
            tempfile.TemporaryFile(dir=out.parent) as names:  # fmt: skip
        count, begun = 0, 0
        calls = ((lambda n=n, url=url: scan(n, url, sizes[n], tasks)) for n, url in enumerate(urls))
        for found in ahead(calls):
            rows, classes, lines = found()
            rows["name"] += begun
            count, begun = count + len(rows), begun + len(lines)
            samples.write(rows.tobytes())
            labels.write(classes.tobytes())
            names.write(lines)
        if not count:
            raise UserError(f"data '{urls[0]}': no images in these shards (looked for {', '.join(sorted(EXTENSIONS))})")
        shards = [[posixpath.basename(url), size] for url, size in zip(urls, sizes, strict=True)]
        header = json.dumps({"shards": shards, "images": count, "tasks": tasks}).encode()
        with open(out, "wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header)
            for part in (samples, labels, names):
                file.write(bytes(aligned(file.tell()) - file.tell()))
                part.seek(0)
                shutil.copyfileobj(part, file, 2**20)


def scan(number: int, url: str, size: int, tasks: list[str]) -> tuple[np.ndarray, np.ndarray, bytes]:
    """One shard's SAMPLE rows, labels [rows, tasks] and lines of names. Raises UserError."""

    def ask() -> tuple[np.ndarray, np.ndarray, bytes]:
        with opened(url, size) as read:
            try:
                return samples_of(number, read, size, tasks)
            except Damaged as error:
                raise UserError(f"data '{url}': {error}") from error

    return patiently(url, ask)


@contextmanager
def opened(url: str, total: int) -> Iterator[Read]:
    """A file of so many bytes that is read from its beginning to its end, in part."""
    if not is_remote(url):
        with open(url, "rb", buffering=0) as local:
            yield lambda offset, size: os.pread(local.fileno(), size, offset)
        return
    begin, held = 0, b""

    def read(offset: int, size: int) -> bytes:
        nonlocal begin, held
        if offset < begin or offset + size > begin + len(held):
            begin, end = offset, min(offset + max(size, AT_ONCE), total)
            held = read_range(url, begin, end) if begin < end else b""
        return held[offset - begin : offset - begin + size]

    yield read


def samples_of(shard: int, read: Read, total: int, tasks: list[str]) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Files that share a name up to the first dot of its last part are one sample, as WebDataset has it."""
    images: dict[str, tuple[int, int, str]] = {}
    answers: dict[str, Any] = {}
    for name, offset, size in members(read, total):
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        key = f"{folder}/{stem}"
        if base.startswith("."):
            continue
        if f".{ending.lower()}" in EXTENSIONS:
            images[key] = (offset, size, name)
        elif ending in ("cls", "json") and size <= LARGEST_LABEL:
            try:
                value = json.loads(read(offset, size))
            except (ValueError, RecursionError):
                continue  # a class by name, or damage: no number
            answers[key] = value if isinstance(value, dict) else dict.fromkeys(tasks[:1], value)
    rows = np.zeros(len(images), SAMPLE)
    labels = np.full((len(images), len(tasks)), UNLABELLED, LABEL)
    lines, begun = [], 0
    for i, (key, (offset, size, name)) in enumerate(images.items()):
        rows[i] = (offset, min(size, 2**31 - 1), shard, begun)
        for t, task in enumerate(tasks):
            label = answers.get(key, {}).get(task)
            if isinstance(label, int) and 0 <= label < MOST_CLASSES:
                labels[i, t] = label
        lines.append(printable(name).encode() + b"\n")
        begun += len(lines[-1])
    return rows, labels, b"".join(lines)

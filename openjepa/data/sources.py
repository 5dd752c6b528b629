"""Where images come from: a folder, Parquet, tar shards, the hub, torchvision, or the embedded scenes.

A source is a numbered list of images. What `read` returns is still encoded; order, crops and batches are made
elsewhere and look the same whatever the source, so the same images give the same run.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from openjepa.data.decode import Raw
from openjepa.errors import UserError, first_line, nearest

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
SPLIT = re.compile(r"train|test|validation|valid|val")  # what names of Parquet files begin with
LABELS = ("label", "labels", "target", "class", "fine_label", "coarse_label")  # columns that need no class names
IN_MEMORY = 2**30  # Parquet bytes read whole; more is laid out on disk and memory-mapped


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
        """The index-th image, encoded (bytes) or not (Pillow image, uint8 array)."""
        raise NotImplementedError

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
            digest.update(task.encode() + self.labels[task].astype("<i8").tobytes())
        for index in np.linspace(0, len(self) - 1, min(probes, len(self))).astype(int):
            try:
                raw = self.read(int(index))
            except OSError:  # training will name it and go on
                raw = b"unreadable"
            digest.update(raw if isinstance(raw, bytes) else np.asarray(raw).tobytes())
        return digest.hexdigest()


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
        return from_hub(rest)
    if kind == "torchvision":
        return TorchvisionSource(rest)
    path = Path(spec).expanduser()
    if not path.is_dir() and spec.endswith(".tar"):
        return Shards(spec)
    if not path.is_dir() and spec.endswith(".parquet"):
        return ParquetSource.from_files(expand_local(spec))
    if not path.exists():
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
            return ParquetSource.from_files([str(file) for file in parquet])
        raise UserError(f"data '{spec}': no images in this folder (looked for {', '.join(sorted(EXTENSIONS))})")
    return Folder(path, images)


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
        with open(os.path.join(self.root, self.files[index]), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return self.files[index].encode(errors="backslashreplace").decode()

    def stamps(self) -> list[str]:
        return [stamp(os.path.join(self.root, file)) for file in self.files]


def stamp(file: str | Path) -> str:
    """A file's size and time of change."""
    about = os.stat(file)
    return f"{about.st_size} {about.st_mtime_ns}"


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


# ---------------------------------------------------------------- Parquet, Arrow, the hub


class ParquetSource(Source):
    """Rows of the Hugging Face image layout: an image column {bytes, path}, and integer label columns if any."""

    def __init__(self, table: Any, spec: str, files: list[str] | None = None) -> None:
        self.spec, self.files = spec, files
        self._table = table
        self.image = image_column(table.schema, spec)
        self.labels, self.classes = label_columns(table)
        self.length = len(table)
        self._chunks: Any = None

    @classmethod
    def from_files(cls, files: list[str]) -> ParquetSource:
        return cls(read_tables(files), files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more", files)

    def __getstate__(self) -> dict[str, Any]:
        """Workers started afresh open the files again instead of receiving their bytes."""
        drop = {"_chunks": None} | ({"_table": None} if self.files else {})
        return self.__dict__ | drop

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> bytes:
        if self._table is None:
            assert self.files is not None
            self._table = read_tables(self.files)
        if self._chunks is None:
            column = self._table.column(self.image)
            self._starts = np.cumsum([0] + [len(chunk) for chunk in column.chunks])
            self._chunks = [chunk.field("bytes") for chunk in column.chunks]
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._chunks[chunk][index - int(self._starts[chunk])].as_py()
        return value if value is not None else b""

    def name(self, index: int) -> str:
        return f"{self.spec} row {index}"

    def stamps(self) -> list[str]:
        return [stamp(file) for file in self.files or []]


def read_tables(files: list[str]) -> Any:
    """All Parquet files as one Arrow table: in memory if small, else through a memory-mapped copy in the cache."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if sum(os.path.getsize(file) for file in files) <= IN_MEMORY:
            return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
        tables = []
        for file in files:
            stat = os.stat(file)
            key = hashlib.blake2b(f"{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8)
            copy = cache_folder() / f"parquet-{key.hexdigest()}.arrow"
            if not copy.exists():
                part = copy.with_suffix(f".{os.getpid()}.part")
                source = pq.ParquetFile(file)
                with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, source.schema_arrow) as writer:
                    for batch in source.iter_batches(1000):
                        writer.write_batch(batch)
                part.rename(copy)
            tables.append(pa.ipc.open_file(pa.memory_map(str(copy))).read_all())
        return pa.concat_tables(tables)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"data '{files[0]}': {first_line(error)}") from error


def image_column(schema: Any, spec: str) -> str:
    """The first struct column with a `bytes` field."""
    import pyarrow as pa

    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
    raise UserError(
        f"data '{spec}': no column {{bytes, path}} of images among {', '.join(schema.names)}: save it in the Hugging Face "
        "image layout"
    )


def label_columns(table: Any) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Integer columns with class names in the Hugging Face metadata, or called a label, are tasks.

    A column with negative numbers, the hub's "unlabelled", is none.
    """
    import pyarrow as pa

    try:
        features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    labels, classes = {}, {}
    for field in table.schema:
        if pa.types.is_integer(field.type) and table.column(field.name).null_count == 0:
            values = table.column(field.name).to_numpy().astype(np.int64)
            names = features.get(field.name, {}).get("names")
            if len(values) == 0 or values.min() < 0 or (names is None and field.name not in LABELS):
                continue
            labels[field.name] = values
            classes[field.name] = [str(n) for n in names or range(int(values.max()) + 1)]
    return labels, classes


def from_hub(rest: str) -> ParquetSource:
    """hf:NAME[:SPLIT] through the hub's own loader."""
    name, _, split = rest.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data 'hf:{rest}' needs the extra: pip install 'openjepa[hf]'") from error
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # its loader raises many kinds; all mean that this spec cannot be had
        raise UserError(f"data 'hf:{rest}': {first_line(error)}") from error
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return ParquetSource(dataset.with_format("arrow")[:], f"hf:{rest}")


# ---------------------------------------------------------------- tar shards


class Shards(Source):
    """WebDataset tar shards, local or at any fsspec URL: files that share a stem are one sample.

    `.cls` (a number) or `.json` with a `label` gives the label. Shards are indexed once, then read at random.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.urls = [url for braces in expand_braces(spec) for url in expand_local(braces)]
        self.entries: list[tuple[int, int, int, str]] = []  # shard, offset, size, name
        found: list[int | None] = []
        for number, url in enumerate(self.urls):
            for key, image, label in index_tar(url):
                self.entries.append((number, *image, key))
                found.append(label)
        if not self.entries:
            raise UserError(f"data '{spec}': no images in these shards (looked for {', '.join(sorted(EXTENSIONS))})")
        self.labels, self.classes = {}, {}
        if all(label is not None and label >= 0 for label in found):
            self.labels["label"] = np.array(found, dtype=np.int64)
            self.classes["label"] = [str(i) for i in range(int(self.labels["label"].max()) + 1)]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> bytes:
        shard, offset, size, _ = self.entries[index]
        if "://" not in self.urls[shard]:
            with open(self.urls[shard], "rb", buffering=0) as local:
                return os.pread(local.fileno(), size, offset)
        import fsspec

        with fsspec.open(self.urls[shard], "rb", cache_type="none") as file:
            file.seek(offset)
            return bytes(file.read(size))

    def stamps(self) -> list[str]:
        """Of local shards; of remote ones the sizes of their images."""
        local = [stamp(url) for url in self.urls if "://" not in url]
        return local or [str(size) for _, _, size, _ in self.entries]

    def name(self, index: int) -> str:
        shard, *_, key = self.entries[index]
        return f"{self.urls[shard]}/{key}"


def index_tar(url: str) -> list[tuple[str, tuple[int, int], int | None]]:
    """The samples of one shard: (key, (offset, size) of the image, label or None)."""
    import fsspec

    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    try:
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                stem, _, ending = base.partition(".")  # the WebDataset rule: up to the first dot
                key = os.path.join(folder, stem)
                if not member.isfile() or base.startswith("."):
                    continue
                if f".{ending.lower()}" in EXTENSIONS:
                    images[key] = (member.offset_data, member.size, member.name)
                elif ending in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    try:
                        value = json.loads(content.read())
                    except ValueError:
                        continue  # a class by name, or damage: no number
                    value = value.get("label") if isinstance(value, dict) else value
                    if isinstance(value, int):
                        labels[key] = value
    except (OSError, tarfile.TarError, ValueError, ImportError) as error:
        raise UserError(f"data '{url}': {str(error) or type(error).__name__}") from error
    return [(name, (offset, size), labels.get(key)) for key, (offset, size, name) in images.items()]


def expand_braces(spec: str) -> list[str]:
    """shard-{0000..0003}.tar and a-{x,y}.tar to all they name."""
    match = re.search(r"\{([^{}]*)\}", spec)
    if not match:
        return [spec]
    inner = match.group(1)
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = bounds.groups()
        if int(first) > int(last):
            raise UserError(f"data '{spec}': the range {{{inner}}} runs backwards")
        options = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        options = inner.split(",")
    head, tail = spec[: match.start()], spec[match.end() :]
    return list(itertools.chain.from_iterable(expand_braces(head + option + tail) for option in options))


def expand_local(spec: str) -> list[str]:
    """A local path or glob to existing files, sorted; URLs pass through."""
    if "://" in spec:
        return [spec]
    path = os.path.expanduser(spec)
    files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"data '{spec}': no such file")
    return files


# ---------------------------------------------------------------- torchvision


class TorchvisionSource(Source):
    """torchvision:NAME[:SPLIT], downloaded to the cache."""

    def __init__(self, rest: str) -> None:
        import torchvision.datasets as library

        name, _, split = rest.partition(":")
        if not hasattr(library, name):
            raise UserError(f"data 'torchvision:{rest}': no such data set{nearest(name, library.__all__)}")
        kind = getattr(library, name)
        which: dict[str, Any] = {"split": split or "train"}
        if "train" in inspect.signature(kind).parameters:
            if split not in ("", "train", "test"):
                raise UserError(f"data 'torchvision:{rest}': {name} has the splits train and test")
            which = {"train": split != "test"}
        try:
            self.data = kind(root=str(cache_folder() / "torchvision"), download=True, **which)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"data 'torchvision:{rest}': {first_line(error)}") from error
        self.spec = rest
        targets = next((getattr(self.data, n) for n in ("targets", "_labels", "labels") if hasattr(self.data, n)), None)
        self.labels, self.classes = {}, {}
        if targets is not None:
            self.labels["label"] = np.array(targets, dtype=np.int64)
            count = int(self.labels["label"].max()) + 1
            self.classes["label"] = [str(c) for c in getattr(self.data, "classes", range(count))]

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Raw:
        image: Raw = self.data[index][0]
        return image

    def name(self, index: int) -> str:
        return f"torchvision:{self.spec} image {index}"


def cache_folder() -> Path:
    """Where derived files may lie: $OPENJEPA_CACHE, or ~/.cache/openjepa."""
    folder = Path(os.environ.get("OPENJEPA_CACHE", "~/.cache/openjepa")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the cache {folder} ({error.strerror}): set OPENJEPA_CACHE") from error
    return folder

"""Parquet files in the Hugging Face image layout, and data sets of its hub."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np

from openjepa.data.sources import Source, cache_folder, stamp
from openjepa.errors import UserError, first_line

LABELS = ("label", "labels", "target", "class", "fine_label", "coarse_label")  # columns that need no class names
IN_MEMORY = 2**30  # Parquet bytes read whole; more is laid out on disk and memory-mapped


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
    except (pa.ArrowException, OSError, ValueError) as error:  # damage is an OSError without a number
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

    A column with negative numbers, the hub's "unlabelled", is none. Raises UserError for a label that has no name.
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
            if names is not None and values.max() >= len(names):
                raise UserError(
                    f"column '{field.name}' has label {values.max()}, and the file's metadata name {len(names)} classes: they do "
                    "not belong together, or the file is damaged"
                )
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

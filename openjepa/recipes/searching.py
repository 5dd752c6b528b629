"""Search among images by their features: neighbours of an image or of a part of one, duplicates, outliers.

`build` makes a LanceDB table of what `embed` wrote: a folder with features.lance and about.json. Its vectors are the features less
their mean. All images share much of their features; what is left says how they differ, so that a cosine near 1 means alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from openjepa.engine.whole import new_folder, refuse_unwritable
from openjepa.errors import UserError, first_line, needs
from openjepa.evaluate.alike import groups, kth_similarity, near_pairs, similarities
from openjepa.recipes.embedding import describe

TABLE = "features"  # its name in the folder's data base
LARGE = 100_000  # rows; of more, an index is asked
ROWS = 4096  # read at once


@dataclass(frozen=True)
class Hit:
    """A row that was found. score: the cosine with what was asked for. place: row and column of a patch."""

    id: int
    path: str
    score: float
    labels: dict[str, str]
    place: tuple[int, int] | None = None

    def said(self) -> dict[str, Any]:
        """What is printed of it."""
        place = {} if self.place is None else {"row": self.place[0], "col": self.place[1]}
        return {"score": round(self.score, 4), "id": self.id, "path": self.path, **place, **self.labels}


# ---------------------------------------------------------------- the table


def build(features: Path, out: Path) -> Table:
    """A table of a file of features, which appears whole or not at all. Raises UserError."""
    about = describe(features)
    with needs("search"):
        import lancedb
        from lancedb.index import IvfFlat
    refuse_unwritable(out)
    with new_folder(out) as folder, pq.ParquetFile(features) as file:
        mean = mean_of(file, about["dim"])
        schema = file.schema_arrow.remove_metadata()
        vector = pa.field("vector", schema.field("feature").type)
        schema = schema.set(schema.get_field_index("feature"), vector)
        parts = pa.RecordBatchReader.from_batches(
            schema, (centred(batch, mean, schema) for batch in file.iter_batches(ROWS))
        )
        table = lancedb.connect(str(folder)).create_table(TABLE, data=parts, schema=schema)
        if table.count_rows() > LARGE:
            table.create_index(
                "vector", config=IvfFlat(distance_type="cosine", num_partitions=partitions(table.count_rows()))
            )
        about |= {"rows": table.count_rows(), "mean": mean.tolist()}
        (folder / "about.json").write_text(json.dumps(about) + "\n")
    return Table(out)


def partitions(rows: int) -> int:
    return round(rows**0.5)


def matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    """[n, D]."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def mean_of(file: pq.ParquetFile, dim: int) -> np.ndarray:
    """float32 [D]."""
    total = np.zeros(dim)
    for batch in file.iter_batches(ROWS, columns=["feature"]):
        total += matrix(batch.column("feature")).sum(0, dtype=np.float64)
    return (total / file.metadata.num_rows).astype(np.float32)


def centred(batch: pa.RecordBatch, mean: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    values = matrix(batch.column("feature"))
    vectors = (values.astype(np.float32) - mean).astype(values.dtype)
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), len(mean))
        if name == "vector"
        else batch.column(name)
        for name in schema.names
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def opened(path: Path) -> Table:
    """A table, or that of a file of features, which is made beside it where it is not there yet. Raises UserError."""
    if path.suffix != ".parquet":
        return Table(path)
    beside = path.with_suffix(".table")
    if not beside.exists():
        return build(path, beside)
    table, about = Table(beside), describe(path)
    if any(table.about[name] != value for name, value in about.items()):
        raise UserError(f"{beside} is not of {path}, but of other features: remove it, or name a table")
    return table


class Table:
    """A folder that `build` made. about: what the file of features says of itself. Raises UserError for what is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())
            self.rows, self.mean = int(self.about["rows"]), np.array(self.about["mean"], dtype=np.float32)
        except (OSError, ValueError, KeyError, TypeError) as error:
            there = (
                "it is no table of openjepa search build" if folder.exists() else "no such table or file of features"
            )
            raise UserError(f"{folder}: {there}") from error

    @cached_property
    def lance(self) -> Any:
        with needs("search"):
            import lancedb
        try:
            return lancedb.connect(str(self.folder)).open_table(TABLE)
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"{self.folder} is damaged ({first_line(error)}): build it again") from error

    @property
    def of_patches(self) -> bool:
        return self.about["pool"] == "patches"

    @property
    def columns(self) -> list[str]:
        """All but the vectors."""
        return ["id", "path", *(["row", "col"] if self.of_patches else []), *self.about["labels"]]

    def hit(self, row: dict[str, Any], score: float) -> Hit:
        labels = {column: names[row[column]] for column, names in self.about["labels"].items()}
        place = (row["row"], row["col"]) if self.of_patches else None
        return Hit(row["id"], row["path"], score, labels, place)

    def vector(self, index: int) -> np.ndarray:
        """Of an image in the table, the mean of its patches' where it holds these. float32 [D]. Raises UserError."""
        found = self.lance.search().where(f"id = {index}").select(["vector"]).limit(self.rows).to_arrow()
        if not len(found):
            raise UserError(f"{self.folder} holds no image {index}: ids go up to {self.about['images'] - 1}")
        return matrix(found.column("vector").combine_chunks()).astype(np.float32).mean(0)

    def all(self) -> tuple[pa.Table, Tensor]:
        """Every row without and with its vector: float32 [n, D]."""
        rows, vectors, first = [], torch.empty(self.rows, self.about["dim"]), 0
        for batch in self.lance.search().select([*self.columns, "vector"]).limit(self.rows).to_batches(ROWS):
            values = matrix(batch.column("vector")).astype(np.float32)
            vectors[first : first + len(values)] = torch.from_numpy(values)
            rows.append(batch.select(self.columns))
            first += len(values)
        return pa.Table.from_batches(rows), vectors

    def nearest(self, vector: np.ndarray, count: int) -> list[Hit]:
        """Rows by cosine with a vector [D] that is less the mean; all are looked at up to LARGE rows, else an index is."""
        query = self.lance.search(vector, vector_column_name="vector").distance_type("cosine")
        if self.rows > LARGE:
            query = query.nprobes(max(20, partitions(self.rows) // 10))
        found = query.select([*self.columns, "_distance"]).limit(count).to_list()
        return [self.hit(row, 1 - row["_distance"]) for row in found]


# ---------------------------------------------------------------- questions


def neighbours(table: Table, vector: np.ndarray, k: int) -> list[Hit]:
    """The k images nearest to a vector [D] that is less the mean; of a table of patches, each by its nearest patch.

    Raises UserError.
    """
    if not 1 <= k <= table.about["held"]:
        raise UserError(f"-k {k}: {table.folder} holds {table.about['held']} images, ask for 1 to as many")
    count = k
    while True:
        found = table.nearest(vector, count)
        best = {hit.id: hit for hit in reversed(found)}
        if len(best) >= k or count >= table.rows:
            return sorted(best.values(), key=lambda hit: -hit.score)[:k]
        count = min(4 * count, table.rows)


def duplicates(table: Table, above: float, device: torch.device) -> list[list[Hit]]:
    """Groups of images that a cosine of at least `above` ties together, the largest first; scores are with a group's first.

    Raises UserError.
    """
    if table.of_patches:
        raise UserError(
            f"{table.folder} holds patches: duplicates need a feature an image (openjepa embed --pool mean)"
        )
    if not -1 <= above <= 1:
        raise UserError(f"--above {above}: a cosine is from -1 to 1")
    rows, vectors = table.all()
    vectors = vectors.to(device)
    found = groups(len(rows), near_pairs(vectors, above))
    return [hits(table, rows, group, similarities(vectors, group[0], group.tolist())) for group in found]


def outliers(table: Table, count: int, k: int, device: torch.device) -> list[Hit]:
    """Rows that are farthest from their k-th neighbour, whose cosine is their score. Raises UserError."""
    if not 1 <= k < table.rows:
        raise UserError(
            f"-k {k}: {table.folder} has {table.rows} rows, so that a neighbour is the 1st to {table.rows - 1}th"
        )
    if count < 1:
        raise UserError(f"-n {count}: give 1 or more")
    rows, vectors = table.all()
    scores = kth_similarity(vectors.to(device), k)
    farthest = scores.argsort(stable=True)[:count]
    return hits(table, rows, farthest.numpy(), scores[farthest].tolist())


def hits(table: Table, rows: pa.Table, which: np.ndarray, scores: list[float]) -> list[Hit]:
    return [table.hit(row, score) for row, score in zip(rows.take(pa.array(which)).to_pylist(), scores, strict=True)]

"""Search among images by their features: neighbours of an image or of a part of one, duplicates, outliers.

`build` makes a LanceDB table of what `embed` wrote: a folder with features.lance, about.json, and whitening.npz, which makes the
table's vectors of features, as cosines say little without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from openjepa.engine.whole import new_folder, refuse_unwritable
from openjepa.errors import UserError, first_line, needs
from openjepa.evaluate.alike import Whitening, groups, kth_similarity, near_pairs, similarities, whitening
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
        rows, (_, columns) = file.metadata.num_rows, about["grid"]

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in file.iter_batches(ROWS, columns=[*place_columns(about), "feature"]):
                yield matrix(batch.column("feature")), places(batch, columns)

        count = math.prod(about["grid"]) if place_columns(about) else 1
        whiten = whitening(batches, rows, count, about["dim"])
        kept = [field for field in file.schema_arrow if field.name != "feature"]
        dim, number = whiten.directions.shape[1], file.schema_arrow.field("feature").type.value_type
        schema = pa.schema([*kept, pa.field("vector", pa.list_(pa.field("item", number), dim))])

        def whitened() -> Iterator[pa.RecordBatch]:
            for batch in file.iter_batches(ROWS):
                vectors = whiten(matrix(batch.column("feature")), places(batch, columns)).astype(about["dtype"])
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
                yield pa.RecordBatch.from_arrays([*(batch.column(field.name) for field in kept), column], schema=schema)

        parts = pa.RecordBatchReader.from_batches(schema, whitened())
        table = lancedb.connect(str(folder)).create_table(TABLE, data=parts, schema=schema)
        if rows > LARGE:
            table.create_index("vector", config=IvfFlat(distance_type="cosine", num_partitions=partitions(rows)))
        np.savez(folder / "whitening.npz", mean=whiten.mean, directions=whiten.directions)
        (folder / "about.json").write_text(json.dumps(about | {"rows": rows}) + "\n")
    return Table(out)


def partitions(rows: int) -> int:
    return round(rows**0.5)


def place_columns(about: dict[str, Any]) -> list[str]:
    return ["row", "col"] if about["pool"] == "patches" else []


def places(batch: pa.RecordBatch, columns: int) -> np.ndarray:
    """The place of each row in the grid, which has so many columns: int [n]. Of whole images there is one."""
    if "row" not in batch.schema.names or "col" not in batch.schema.names:
        return np.zeros(len(batch), dtype=np.int64)
    return batch.column("row").to_numpy() * columns + batch.column("col").to_numpy()


def matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    """[n, D]."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


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
            self.rows = int(self.about["rows"])
            with np.load(folder / "whitening.npz") as arrays:
                self.whiten = Whitening(arrays["mean"], arrays["directions"])
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
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
        return ["id", "path", *place_columns(self.about), *self.about["labels"]]

    def hit(self, row: dict[str, Any], score: float) -> Hit:
        labels = {column: names[row[column]] for column, names in self.about["labels"].items()}
        place = (row["row"], row["col"]) if self.of_patches else None
        return Hit(row["id"], row["path"], score, labels, place)

    def vector(self, index: int) -> np.ndarray:
        """Of an image in the table, the mean of its patches' where it holds these. float32 [d]. Raises UserError."""
        found = self.lance.search().where(f"id = {index}").select(["vector"]).limit(self.rows).to_arrow()
        if not len(found):
            raise UserError(f"{self.folder} holds no image {index}: ids go up to {self.about['images'] - 1}")
        return matrix(found.column("vector").combine_chunks()).astype(np.float32).mean(0)

    def all(self) -> tuple[pa.Table, Tensor]:
        """Every row without its vector, and all vectors: float32 [n, d]."""
        rows, vectors, first = [], torch.empty(self.rows, self.whiten.directions.shape[1]), 0
        for batch in self.lance.search().select([*self.columns, "vector"]).limit(self.rows).to_batches(ROWS):
            values = matrix(batch.column("vector")).astype(np.float32)
            vectors[first : first + len(values)] = torch.from_numpy(values)
            rows.append(batch.select(self.columns))
            first += len(values)
        return pa.Table.from_batches(rows), vectors

    def nearest(self, vector: np.ndarray, count: int) -> list[Hit]:
        """Rows by cosine with a vector [d]; all are looked at up to LARGE rows, else an index is."""
        query = self.lance.search(vector, vector_column_name="vector").distance_type("cosine")
        if self.rows > LARGE:
            query = query.nprobes(max(20, partitions(self.rows) // 5))
        found = query.select([*self.columns, "_distance"]).limit(count).to_list()
        return [self.hit(row, 1 - row["_distance"]) for row in found]


# ---------------------------------------------------------------- questions


def neighbours(table: Table, vector: np.ndarray, k: int) -> list[Hit]:
    """The k images nearest to a vector [d]; of a table of patches, each by its nearest patch.

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
            f"-k {k}: {table.folder} has {table.rows} rows, and each of them {table.rows - 1} neighbours: ask for 1 to as many"
        )
    if count < 1:
        raise UserError(f"-n {count}: give 1 or more")
    rows, vectors = table.all()
    scores = kth_similarity(vectors.to(device), k)
    farthest = scores.argsort(stable=True)[:count]
    return hits(table, rows, farthest.numpy(), scores[farthest].tolist())


def hits(table: Table, rows: pa.Table, which: np.ndarray, scores: list[float]) -> list[Hit]:
    return [table.hit(row, score) for row, score in zip(rows.take(pa.array(which)).to_pylist(), scores, strict=True)]

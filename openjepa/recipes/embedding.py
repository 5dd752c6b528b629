"""Features of every image of a source in one Parquet file, at inference speed; a killed embed goes on where it stopped.

OUT.part/ holds about.json, which says what is being made, and a small Parquet file for each block of images that is whole. At the
end these become the row groups of OUT, which appears whole or not at all; so no more than a block is ever in memory.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from openjepa.data.decode import PIXELS_VERSION, BadImage, decode
from openjepa.data.sources import Source, first_use, open_source
from openjepa.data.workers import loaded
from openjepa.engine import checkpoint
from openjepa.engine.device import (
    Precision,
    TrainingPrecision,
    pick_autocast,
    pick_device,
    pick_precision,
    pick_workers,
)
from openjepa.engine.whole import flush, make_folder, refuse_unwritable, taken, write_whole
from openjepa.errors import UserError, first_line, printable
from openjepa.evaluate.features import BATCH, EncoderFeatures, View, short_hash, weights_hash
from openjepa.models.encoder import Encoder
from openjepa.models.layers import compile_blocks
from openjepa.recipes.exchange import is_run, load
from openjepa.recipes.pretrain import saved_recipe

Pool = Literal["mean", "patches"]

VERSION = 1  # of the columns and of what the file says of itself
BLOCK, BLOCK_BYTES = 1024, 2**26  # images that are kept together, at most, and bytes of their features
ABOUT = b"openjepa"  # the key of what the file says of itself
NAMES = ("run", "step", "data")  # may be other words for the same: hashes say what they are
COLUMNS = ("id", "path", "row", "col", "feature")  # ours; a set of labels of such a name becomes label_NAME


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What `openjepa embed` is asked."""

    run: str  # or a checkpoint, or anything that load takes
    data: str  # SPEC
    out: Path
    layers: int = 1  # the last ones, concatenated, the last block's last
    pool: Pool = "mean"  # one row an image; patches: one row a patch
    half: bool = False  # float16
    network: str | None = None
    image_size: tuple[int, int] | None = None  # height, width in pixels, where other than the encoder's
    share: float | None = None  # of the central crop; none: all
    squash: bool = False
    precision: Precision | None = None  # none: the run's
    device: str = "auto"
    workers: int | None = None  # none: as many as pay on the device
    compile: bool = False  # the blocks, where the images are so many that it pays


@dataclass(frozen=True)
class Embedded:
    """images: whose features OUT holds; made: by this call, in so many seconds; dim: numbers a feature; skipped: names and reasons
    of the images that could not be read."""

    images: int
    made: int
    dim: int
    skipped: list[str]
    seconds: float


def embed(asked: Embedding, console: Console) -> Embedded:
    """Write the features of all images that can be read to OUT; the others are named in OUT.skipped.txt.

    Where OUT is there and holds just that, nothing is done. Raises UserError.
    """
    out, part = asked.out, asked.out.with_name(asked.out.name + ".part")
    if out.suffix != ".parquet" or re.match(r"\w+:/", str(out)):
        raise UserError(f"--out {out}: give a file of this machine that ends in .parquet")
    if asked.layers < 1:
        raise UserError(f"--layers is {asked.layers}: give 1 or more")
    refuse_unwritable(out.parent)
    before = describe(out) if out.exists() else begun(part)
    device = pick_device(asked.device)
    precision = asked.precision or (before or {}).get(
        "precision"
    )  # where it is measured, another time may choose another
    encoder, about, precision = encoder_of(asked.run, asked.network, asked.image_size, precision, device)
    if asked.compile:
        compile_blocks(encoder.vit.blocks)
    source = open_source(asked.data, encoder.vit.config.image_size)
    squash = asked.squash or source.whole
    share = 1.0 if squash or asked.share is None else asked.share
    view = View(encoder.vit.config.image_size, encoder.vit.config.channels, share, squash)
    extractor = EncoderFeatures(encoder, view, pick_autocast(precision, device), precision, asked.layers)
    about = json.loads(json.dumps(about | of_features(extractor, asked.pool, asked.half) | of_data(asked.data, source)))
    if before:
        refuse_other(before, about, out if out.exists() else part)
    made, start = 0, time.perf_counter()
    if not out.exists():
        make_folder(part)
        with taken(part, f"another process is writing {out}: wait for it, or choose another --out"):
            if not before:
                write_whole(part / "about.json", json.dumps(about, indent=1) + "\n")
            blocks = Blocks(part, source, extractor, before or about)
            made = blocks.fill(pick_workers(asked.workers, device), console)
            blocks.join(out)
    if part.exists():  # of one that was killed at its very end, too
        shutil.rmtree(part)
    held = describe(out)
    return Embedded(held["held"], made, held["dim"], skipped_of(out), time.perf_counter() - start)


# ---------------------------------------------------------------- who looks, and how


def encoder_of(run: str, network: str | None, size: tuple[int, int] | None, precision: Precision | None,
               device: torch.device) -> tuple[Encoder, dict[str, Any], Precision]:  # fmt: skip
    """The encoder for images of a size, what is known of it, and the precision it runs in. Raises UserError."""
    encoder = load(run, network)
    about: dict[str, Any] = {"run": run, "step": None, "network": encoder.network}
    learned: TrainingPrecision = "auto"
    if is_run(Path(run)):
        folder, found = checkpoint.locate(Path(run))
        about["step"] = found.step
        learned = saved_recipe(folder).precision
    if size and size != encoder.vit.config.image_size:
        encoder = encoder.resized(size)
    about["weights"] = weights_hash(encoder.vit)
    return encoder.to(device), about, pick_precision(precision or learned, device)


def features_of(extractor: EncoderFeatures, images: Tensor, pool: Pool) -> Tensor:
    """uint8 [B, C, H, W] to float32 [B, 1, layers * D], the features that evaluations use, or of patches [B, N, layers * D].

    On the CPU.
    """
    if pool == "mean":
        return extractor(images).flatten(1)[:, None]
    device = extractor.encoder.vit.patch_embed.proj.weight.device
    with torch.no_grad(), extractor.autocast():
        return extractor.encoder.features(images.to(device), extractor.layers, pool="none").float().cpu()


def of_features(extractor: EncoderFeatures, pool: Pool, half: bool) -> dict[str, Any]:
    """All that the numbers depend on besides the weights and the images."""
    config = extractor.encoder.vit.config
    layers = len(extractor.encoder.vit.last(extractor.layers))
    return {
        "version": VERSION,
        "view": asdict(extractor.view),
        "decoding": PIXELS_VERSION,
        "precision": extractor.precision,
        "layers": layers,
        "pool": pool,
        "dim": layers * config.dim,
        "dtype": "float16" if half else "float32",
        "grid": [side // config.patch_size for side in extractor.view.size],
        "patch": config.patch_size,
    }


def of_data(spec: str, source: Source) -> dict[str, Any]:
    """Which images, and what their labels are called."""
    return {
        "data": spec,
        "images": len(source),
        "fingerprint": source.fingerprint(),
        "stamps": short_hash(source.stamps()),
        "labels": {column_of(task): [str(name) for name in names] for task, names in source.classes.items()
                   if task in source.labels},
    }  # fmt: skip


def column_of(task: str) -> str:
    return f"label_{task}" if task in COLUMNS else task


# ---------------------------------------------------------------- images in


@dataclass(frozen=True)
class Read:
    """Some images in order: uint8 [B, C, H, W] and indices [B] of those that could be read, names and reasons of the others."""

    images: Tensor
    indices: np.ndarray
    skipped: list[str] = field(default_factory=list)


class Reading(Dataset[Read]):
    """Item i is the i-th range of a source's images in one view."""

    def __init__(self, source: Source, view: View, ranges: Sequence[range]) -> None:
        self.source, self.view, self.ranges = source, view, ranges

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, i: int) -> Read:
        """Raises UserError where the disk or the network is at fault."""
        indices = self.ranges[i]
        images, good, skipped = [], [], []
        for index, read in zip(indices, self.source.reads(indices), strict=True):
            try:
                images.append(decode(read(), self.view.box, self.view.size, self.view.channels))
                good.append(index)
            except (BadImage, FileNotFoundError, PermissionError) as error:
                skipped.append(printable(f"{self.source.name(index)}: {first_line(error)}"))
            except OSError as error:  # the disk or the network, not the image
                raise UserError(f"cannot read {self.source.name(index)}: {first_line(error)}") from error
        shape = (0, *self.view.size, self.view.channels)
        stacked = torch.from_numpy(np.stack(images) if images else np.zeros(shape, np.uint8))
        return Read(stacked.permute(0, 3, 1, 2), np.array(good, dtype=np.int64), skipped)


# ---------------------------------------------------------------- features out


class Blocks:
    """The folder that a file is made in. about: what the file is to say of itself."""

    def __init__(self, folder: Path, source: Source, extractor: EncoderFeatures, about: dict[str, Any]) -> None:
        self.folder, self.source, self.extractor, self.about = folder, source, extractor, about
        rows, columns = about["grid"] if about["pool"] == "patches" else (1, 1)
        self.dtype = np.dtype(about["dtype"])
        self.size = max(1, min(BLOCK, BLOCK_BYTES // (rows * columns * about["dim"] * self.dtype.itemsize)))
        self.count = -(-len(source) // self.size)
        self.schema = schema_of(about)

    def file(self, block: int) -> Path:
        return self.folder / f"block-{block:06}.parquet"

    def ranges(self, block: int) -> list[range]:
        """The batches of a block."""
        end = min((block + 1) * self.size, len(self.source))
        return [range(first, min(first + BATCH, end)) for first in range(block * self.size, end, BATCH)]

    def fill(self, workers: int, console: Console) -> int:
        """Make the blocks that are not there. Returns how many images that were. Raises UserError."""
        todo = [block for block in range(self.count) if not self.file(block).exists()]
        reading = Reading(self.source, self.extractor.view, [part for block in todo for part in self.ranges(block)])
        done = 0
        if workers:
            first_use(self.source)
        with contextlib.closing(loaded(reading, workers, batch_size=None)) as made:
            for block in track(todo, "embedding", console=console, transient=True, disable=console.quiet):
                tables, skipped = [], []
                for read in (next(made) for _ in self.ranges(block)):
                    if len(read.indices):
                        tables.append(
                            self.table(read.indices, features_of(self.extractor, read.images, self.about["pool"]))
                        )
                    skipped += read.skipped
                    done += len(read.indices)
                self.write(block, pa.concat_tables([self.schema.empty_table(), *tables]), skipped)
        return done

    def table(self, indices: np.ndarray, features: Tensor) -> pa.Table:
        """Rows of some images. features: [B, 1 or N, D]. Raises UserError for any that are not finite."""
        with np.errstate(over="ignore"):
            values = features.numpy().astype(self.dtype)  # [B, N, D]
        odd = ~np.isfinite(values).all((1, 2))
        if odd.any():
            name, why = self.source.name(int(indices[odd.argmax()])), "the weights are damaged, or overflow in bf16"
            if features.isfinite().all():
                why = "they are too large for float16, leave --half out"
            raise UserError(f"the features of {name} are not finite: {why}")
        count, each, dim = values.shape
        image = np.repeat(np.arange(count), each)
        paths = pa.array([self.source.name(int(index)) for index in indices], pa.string())
        columns = {"id": pa.array(indices[image]), "path": paths.take(pa.array(image))}
        if self.about["pool"] == "patches":
            places = np.indices(self.about["grid"]).reshape(2, 1, each).repeat(count, 1).reshape(2, -1)
            columns |= {
                name: pa.array(place.astype(np.int32)) for name, place in zip(("row", "col"), places, strict=True)
            }
        columns |= {column_of(task): pa.array(labels[indices][image]) for task, labels in self.source.labels.items()}
        columns["feature"] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim)
        return pa.Table.from_pydict({name: columns[name] for name in self.schema.names}, schema=self.schema)

    def write(self, block: int, table: pa.Table, skipped: list[str]) -> None:
        """One block, whole or not at all."""
        part = self.file(block).with_suffix(".part")
        with new_parquet(part, self.schema.with_metadata({b"skipped": json.dumps(skipped)})) as writer:
            writer.write_table(table)
        part.rename(self.file(block))
        flush(self.folder)

    def join(self, out: Path) -> None:
        """All blocks to OUT, each a row group. Raises UserError where there is no image in any."""
        files = [pq.ParquetFile(self.file(block)) for block in range(self.count)]
        skipped = [line for file in files for line in json.loads(file.schema_arrow.metadata[b"skipped"])]
        held = self.about["images"] - len(skipped)
        if not held:
            shutil.rmtree(self.folder)
            raise UserError(f"data '{self.about['data']}': none of its {len(skipped)} images can be read; {skipped[0]}")
        part = self.folder / "joined.part"
        about = {ABOUT: json.dumps(self.about | {"held": held}), b"huggingface": hub_of(self.about["labels"])}
        with new_parquet(part, self.schema.with_metadata(about)) as writer:
            for file in files:
                if file.metadata.num_rows:
                    writer.write_table(file.read(), row_group_size=file.metadata.num_rows)
        beside = skipped_file(out)
        if skipped:
            write_whole(beside, "".join(f"{line}\n" for line in skipped))
        else:
            beside.unlink(missing_ok=True)
        part.rename(out)
        flush(out.parent)


def schema_of(about: dict[str, Any]) -> pa.Schema:
    number = pa.float16() if about["dtype"] == "float16" else pa.float32()
    places = [("row", pa.int32()), ("col", pa.int32())] if about["pool"] == "patches" else []
    labels = [(column, pa.int64()) for column in about["labels"]]
    feature = pa.list_(pa.field("item", number), about["dim"])
    return pa.schema([("id", pa.int64()), ("path", pa.string()), *places, *labels, ("feature", feature)])


def hub_of(labels: dict[str, list[str]]) -> str:
    """What the hub's libraries read the class names from."""
    features = {column: {"names": names, "_type": "ClassLabel"} for column, names in labels.items()}
    return json.dumps({"info": {"features": features}})


@contextlib.contextmanager
def new_parquet(file: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A file of features, which no compression makes smaller, on the disk when it is closed."""
    words = [name for name in schema.names if name != "feature"]
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=words, write_statistics=words) as writer:
        yield writer
    flush(file)


# ---------------------------------------------------------------- what is there


def describe(file: Path) -> dict[str, Any]:
    """What a file of features says of itself. Raises UserError for what is none."""
    try:
        found = json.loads((pq.read_schema(file).metadata or {})[ABOUT])
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file (openjepa embed makes it)") from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        why = "it is no file of openjepa embed" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{file}: {why}") from error
    if found["version"] != VERSION:
        raise UserError(f"{file} was made by another version of openjepa: embed again")
    return found


def begun(part: Path) -> dict[str, Any] | None:
    """What an embed that stopped was making."""
    try:
        return json.loads((part / "about.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{part / 'about.json'} is damaged ({first_line(error)}): remove {part}") from error


def refuse_other(before: dict[str, Any], about: dict[str, Any], where: Path) -> None:
    """Raises UserError if what is there is not what is asked."""
    other = [name for name, value in about.items() if name not in NAMES and before.get(name) != value]
    if not other:
        return
    named = {"weights": "weights", "fingerprint": "images", "stamps": "images, changed since"}
    first = other[0]
    what = named.get(first) or f"{first} {before.get(first)}, not {about[first]}"
    raise UserError(f"{where} holds other features ({what}): remove it, or choose another --out")


def skipped_file(out: Path) -> Path:
    return out.with_name(out.name + ".skipped.txt")


def skipped_of(out: Path) -> list[str]:
    """Names and reasons of the images that were left out."""
    file = skipped_file(out)
    return file.read_text().splitlines() if file.exists() else []

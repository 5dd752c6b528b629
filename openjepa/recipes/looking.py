"""What a search asks, and pictures of what it found: parts of images by their encoder, images of a table by their SPEC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openjepa.data.decode import BadImage, Box, Raw, decode
from openjepa.data.sources import open_source, read_file
from openjepa.engine.device import pick_autocast
from openjepa.errors import UserError, first_line
from openjepa.evaluate.features import EncoderFeatures, View
from openjepa.recipes.embedding import encoder_of, features_of
from openjepa.recipes.searching import Hit, Table
from openjepa.see.contact import Tile, contact_sheet
from openjepa.see.files import save_picture

WIDE = 192  # pixels of an image's longer side in a picture, at least
COLUMNS = 8  # of a contact sheet


# ---------------------------------------------------------------- what is looked for


@dataclass(frozen=True)
class Region:
    """A part of an image: a box (left, top, width, height in pixels), or one patch (row, column)."""

    box: tuple[int, int, int, int] | None = None
    patch: tuple[int, int] | None = None

    def patches(self, grid: tuple[int, int], crop: Box, size: tuple[int, int]) -> np.ndarray:
        """Whose centres lie in it, or the one it lies in. bool [rows, columns]. Raises UserError.

        crop: left, top, right, bottom of what the encoder sees of an image of a size (width, height).
        """
        inside = np.zeros(grid, dtype=bool)
        if self.patch:
            if not all(0 <= place < side for place, side in zip(self.patch, grid, strict=True)):
                raise UserError(
                    f"--patch {self.patch[0]},{self.patch[1]}: rows are 0 to {grid[0] - 1}, columns 0 to {grid[1] - 1}"
                )
            inside[self.patch] = True
            return inside
        assert self.box
        left, top, width, height = self.box
        said = f"--box {left},{top},{width},{height}"
        if width < 1 or height < 1 or left < 0 or top < 0 or left + width > size[0] or top + height > size[1]:
            raise UserError(f"{said} is not in the image, of {size[0]}x{size[1]} pixels (left, top, width, height)")
        tall, wide = (crop[3] - crop[1]) / grid[0], (crop[2] - crop[0]) / grid[1]
        ys, xs = crop[1] + (np.arange(grid[0]) + 0.5) * tall, crop[0] + (np.arange(grid[1]) + 0.5) * wide
        inside[np.ix_((top <= ys) & (ys < top + height), (left <= xs) & (xs < left + width))] = True
        if not inside.any():  # smaller than a patch
            row, column = int((top + height / 2 - crop[1]) // tall), int((left + width / 2 - crop[0]) // wide)
            if not (0 <= row < grid[0] and 0 <= column < grid[1]):
                shown = ",".join(str(round(side)) for side in (crop[0], crop[1], crop[2] - crop[0], crop[3] - crop[1]))
                raise UserError(f"{said} lies beyond what the encoder sees of the image, its central crop {shown}")
            inside[row, column] = True
        return inside


class Looker:
    """The encoder that a table's features are of, for images that are not in it. Raises UserError for any other."""

    def __init__(self, table: Table, run: str | None, device: torch.device) -> None:
        about = table.about
        view, run = view_of(about), run or about["run"]
        encoder, own, precision = encoder_of(run, about["network"], view.size, about["precision"], device)
        if own["weights"] != about["weights"]:
            made = f"{about['run']}" + (f" at step {about['step']}" if about["step"] is not None else "")
            now = run + (f" at step {own['step']}" if own["step"] is not None else "")
            raise UserError(
                f"{table.folder} was made with other weights, of {made}, than {now} has: give them, --run RUN"
            )
        self.extractor = EncoderFeatures(encoder, view, pick_autocast(precision, device), precision, about["layers"])
        self.grid = (about["grid"][0], about["grid"][1])
        self.patch = about["patch"]

    def patches(self, raw: Raw, region: Region | None, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of an image's patches, float32 [rows, columns, D], and which of them are meant. Raises UserError."""
        pixels, size = seen(raw, self.extractor.view, self.extractor.view.size, name)
        if min(size) < self.patch:
            raise UserError(f"{name} is {size[0]}x{size[1]} pixels, smaller than a patch of {self.patch}")
        crop = self.extractor.view.box(*size)
        inside = region.patches(self.grid, crop, size) if region else np.ones(self.grid, dtype=bool)
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        features = features_of(self.extractor, images, "patches")[0]
        return features.unflatten(0, self.grid).numpy(), inside


def view_of(about: dict[str, Any]) -> View:
    view = about["view"]
    return View((view["size"][0], view["size"][1]), view["channels"], view["share"], view["squash"])


def seen(raw: Raw, view: View, size: tuple[int, int], name: str) -> tuple[np.ndarray, tuple[int, int]]:
    """What a view shows of an image, uint8 [height, width, C] of a size, and the image's own width and height. Raises UserError."""
    own = (0, 0)

    def choose(width: int, height: int) -> Box:
        nonlocal own
        own = (width, height)
        return view.box(width, height)

    try:
        return decode(raw, choose, size, view.channels), own
    except BadImage as error:
        raise UserError(f"{name} cannot be read as an image: {error}") from error


# ---------------------------------------------------------------- asked, and shown


class Pictures:
    """The images that a table is of, by their ids. Raises UserError where they are not what they were."""

    def __init__(self, table: Table, data: str | None) -> None:
        about = table.about
        self.view, self.grid = view_of(about), about["grid"]
        spec = data or about["data"]
        try:
            self.source = open_source(spec, self.view.size)
        except UserError as error:
            raise UserError(f"{error}; the images that {table.folder} is of are needed: --data SPEC") from error
        if self.source.fingerprint() != about["fingerprint"]:
            raise UserError(f"data '{spec}' has other images than those that {table.folder} is of")

    def raw(self, index: int) -> Raw:
        try:
            return self.source.read(index)
        except (BadImage, OSError) as error:
            raise UserError(f"cannot read {self.source.name(index)}: {first_line(error)}") from error

    def tile(self, hit: Hit) -> Tile:
        part = None
        if hit.place:
            rows, columns = self.grid
            part = (hit.place[1] / columns, hit.place[0] / rows, 1 / columns, 1 / rows)
        labels = " ".join(hit.labels.values())
        return Tile(self.shown(self.raw(hit.id), hit.path), (f"{hit.score:.3f} {labels}", hit.path), part)

    def shown(self, raw: Raw, name: str) -> np.ndarray:
        """What the encoder saw of an image, large enough to look at."""
        return shown(raw, self.view, name)


def shown(raw: Raw, view: View, name: str) -> np.ndarray:
    """As `seen`, at least WIDE."""
    scale = max(1.0, WIDE / max(view.size))
    return seen(raw, view, (round(scale * view.size[0]), round(scale * view.size[1])), name)[0]


@dataclass(frozen=True)
class Query:
    """What to look for. vector: float32 [d], as a table's are. raw: the image, none of an id that is not drawn. inside: of the
    region's patches, bool [rows, columns]."""

    vector: np.ndarray
    raw: Raw | None
    name: str
    inside: np.ndarray | None

    def tile(self, view: View) -> Tile:
        part = None
        if self.inside is not None:
            (top, bottom), (left, right) = (np.flatnonzero(self.inside.any(axis))[[0, -1]] for axis in (1, 0))
            rows, columns = self.inside.shape
            part = (left / columns, top / rows, (right + 1 - left) / columns, (bottom + 1 - top) / rows)
        assert self.raw is not None
        return Tile(shown(self.raw, view, self.name), ("asked", self.name), part, asked=True)


def query(table: Table, image: str, region: Region | None, run: str | None, data: str | None, device: torch.device,
          drawn: bool) -> Query:  # fmt: skip
    """An image's file, or the id of one in the table; whole, or a region of it. Raises UserError."""
    if region and not table.of_patches:
        raise UserError(
            f"{table.folder} holds whole images: a part of one is looked for among patches (openjepa embed --pool patches)"
        )
    if Path(image).exists() or not image.isdecimal():
        try:
            raw: Raw = read_file(image)
        except (BadImage, OSError) as error:
            hint = "" if Path(image).exists() else ", nor the id of an image in the table"
            raise UserError(f"{image}: {first_line(error)}{hint}") from error
        return of_image(Looker(table, run, device), table, raw, image, region)
    if not region and not drawn:
        return Query(table.vector(int(image)), None, image, None)
    vector = table.vector(int(image))
    raw = Pictures(table, data).raw(int(image))
    if not region:
        return Query(vector, raw, image, None)
    return of_image(Looker(table, run, device), table, raw, image, region)


def of_image(looker: Looker, table: Table, raw: Raw, name: str, region: Region | None) -> Query:
    """An image that need not be in the table, or, where the table holds patches, a region of it. Raises UserError."""
    patches, inside = looker.patches(raw, region, name)
    if not table.of_patches:
        return Query(table.whiten(patches.reshape(1, -1, patches.shape[-1]).mean(1))[0], raw, name, None)
    vectors = table.whiten(patches[inside], np.flatnonzero(inside))
    return Query(vectors.mean(0), raw, name, inside if region else None)


def draw(rows: Sequence[Sequence[Tile]], file: Path) -> None:
    """A contact sheet, as the kind of picture that the file's name says. Raises UserError."""
    save_picture(contact_sheet(rows), file)


def wrapped(tiles: Sequence[Tile]) -> list[Sequence[Tile]]:
    """In rows of COLUMNS."""
    return [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]

"""What the page asks of a run. Every answer is another module's; here they only meet an image and a block.

Images are shown as the encoder sees them, larger; blocks are counted in patches of its grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from openjepa.data.decode import BadImage, Box, Raw, size_of
from openjepa.data.sources import Source, open_source
from openjepa.decoder.paint import Sampling
from openjepa.decoder.place import Place
from openjepa.engine.device import pick_device
from openjepa.engine.run import read_metrics
from openjepa.errors import UserError, first_line
from openjepa.evaluate.features import readable
from openjepa.evaluate.surprise import usual_block
from openjepa.masking import Grid
from openjepa.models.encoder import Encoder
from openjepa.recipes.decoding import Decoder, Shown, hidden, hypotheses, load_decoder
from openjepa.recipes.exchange import Trained, load_run
from openjepa.recipes.expecting import Gallery
from openjepa.recipes.looking import Looker, Pictures, Region, of_image, seen, shown
from openjepa.recipes.pretrain import FIRST, own_images
from openjepa.recipes.report import latest, spoken
from openjepa.recipes.searching import Table, neighbours, opened
from openjepa.recipes.surprise import Judge, PatchView, judge_of, surprise_of, view_of, without_predictor
from openjepa.rng import permutation
from openjepa.see import figures, pictures
from openjepa.see.contact import Tile
from openjepa.see.patches import Palette, likeness
from openjepa.see.patches import seen as patches_of
from openjepa.see.report import drawn
from openjepa.see.sheet import Cell, draw

MOST_BYTES = 20 * 10**6  # of an uploaded file
MOST_PIXELS = 50 * 10**6  # of an uploaded image: told by its header, before anything is decoded
GALLERY = 500  # images of the run's that predictions are looked for in
BASIS = 64  # of them, that colours and likeness are measured against
USUAL = 200  # images that tell what surprise is usual
FOUND = 8  # neighbours
SAMPLES = 4
CLICKABLE = 1024  # pixels of the longer side of an image that is clicked
STEPS = 25  # of DDIM

Captioned = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Looked:
    """An image that is looked at. raw: as it came; size: its width and height; view: what the encoder gets of it.

    seen: that, uint8 [C, H, W] of the encoder's size; shown: the same, larger.
    """

    name: str
    raw: Raw
    size: tuple[int, int]
    view: PatchView
    seen: Tensor
    shown: Tensor


class Studio:
    """A run, with a decoder and a table of its features where they are given. Raises UserError for what does not belong to it."""

    def __init__(self, run: str, decoder: str | None = None, table: str | None = None, data: str | None = None,
                 device: str = "auto") -> None:  # fmt: skip
        """data: images to choose from and compare with, those that the run was trained on unless told."""
        self.decoder: Decoder | None = load_decoder(run, decoder, device) if decoder else None
        self.trained: Trained = self.decoder.trained if self.decoder else load_run(run)
        self.device = pick_device(device)
        self.trained.method.to(self.device)
        self.grid: Grid = self.trained.recipe.model.grid
        self.source: Source = source_of(self.trained, data)
        self.table: Table | None = opened(Path(table)) if table else None
        self.looker = Looker(self.table, run, self.device) if self.table else None
        self.predicts = without_predictor(self.trained) is None

    # ------------------------------------------------------------ images

    def pick(self, number: int) -> Looked:
        """An image of the run's data. Raises UserError."""
        if not 0 <= number < len(self.source):
            raise UserError(f"there is no image {number}: they are numbered 0 to {len(self.source) - 1}")
        try:
            raw = self.source.read(number)
        except (BadImage, OSError) as error:
            raise UserError(f"{self.source.name(number)}: {first_line(error)}") from error
        return self.look(self.source.name(number), raw, view_of(self.trained, self.source))

    def upload(self, raw: bytes) -> Looked:
        """An image of somebody's own. Raises UserError for what is none, too large, or smaller than a patch."""
        if len(raw) > MOST_BYTES:
            raise UserError(f"{len(raw) / 1e6:.0f} MB are more than the {MOST_BYTES / 1e6:.0f} that are taken")
        try:
            width, height = size_of(raw)
        except BadImage as error:
            raise UserError(f"your image cannot be read as an image: {error}") from error
        if width * height > MOST_PIXELS:
            raise UserError(f"{width}x{height} pixels are more than the {MOST_PIXELS / 1e6:.0f} million that are taken")
        return self.look("your image", raw, view_of(self.trained))

    def look(self, name: str, raw: Raw, view: PatchView) -> Looked:
        small, size = seen(raw, view, view.size, name)
        return Looked(name, raw, size, view, as_tensor(small), as_tensor(shown(raw, view, name)))

    @cached_property
    def images(self) -> Tensor:
        """Some of the run's, a fixed random choice, uint8 [n, C, H, W]."""
        chosen = permutation(0, "studio", 0, len(self.source))[:GALLERY]
        return readable(self.source, chosen, view_of(self.trained, self.source))[0]

    # ------------------------------------------------------------ behind a block

    def usual(self) -> tuple[int, int, int, int]:
        """Where a block begins: row, column, height, width, as large as the run's own targets, in the middle."""
        height, width = usual_block(self.grid, self.trained.recipe.masking.target_scale)
        return (self.grid[0] - height) // 2, (self.grid[1] - width) // 2, height, width

    def place(self, looked: Looked, block: tuple[int, int, int, int]) -> Place:
        """A block of patches on the image as it is shown. Raises UserError for one outside, or one that leaves nothing visible."""
        top, left, height, width = block
        rows, columns = self.grid
        if min(height, width) < 1 or min(top, left) < 0 or top + height > rows or left + width > columns:
            raise UserError(
                f"the block of {height}x{width} at {top},{left} is not in the grid of {rows}x{columns} patches"
            )
        if (height, width) == self.grid:
            raise UserError("the block covers all of the image: leave some of it visible")
        h, w = looked.shown.shape[1:]
        return Place((0, 0, w, h), self.grid, (top, top + height), (left, left + width))

    def context(self, looked: Looked, place: Place) -> Image.Image:
        return draw(Cell(hidden(self.block(looked, place)), place.box))

    def block(self, looked: Looked, place: Place) -> Shown:
        return Shown(looked.name, looked.shown, looked.seen, place)

    @cached_property
    def gallery(self) -> Gallery:
        return Gallery(self.trained, self.images)

    def expected(self, looked: Looked, place: Place) -> tuple[Captioned, str]:
        """The blocks of other images that are nearest to the prediction, framed, and how near the block itself is.

        Where nothing is predicted, the nearest to the block's own features.
        """
        found = self.gallery.nearest(looked.seen, place.masks(), FOUND)
        h, w = looked.seen.shape[1:]
        own = Place((0, 0, w, h), self.grid, place.rows, place.columns)
        tiles = [
            (draw(Cell(self.gallery.images[i], own.box)), f"{c:.2f}")
            for i, c in zip(found.places, found.cosines, strict=True)
        ]
        where = f"among the same place of {found.others} other images, by cosine"
        if self.gallery.of == "block":
            return tiles, f"Nearest to the block's own features, as nothing is predicted here, {where}."
        return tiles, (
            f"Nearest to the prediction, {where}. What is really there would be number {found.rank} of {found.others + 1}."
        )

    def samples(self, looked: Looked, place: Place, seed: int) -> Captioned:
        """What the decoder paints in the block's place. Raises UserError without one."""
        if self.decoder is None:
            raise UserError("no decoder was given: openjepa studio RUN --decoder DECODER")
        sampling = Sampling(sampler="ddim", steps=STEPS, seed=seed)
        (painted,) = hypotheses(self.decoder, [self.block(looked, place)], SAMPLES, sampling)
        box = place.box if self.decoder.recipe.rcdm.paint == "block" else None
        return [(draw(Cell(picture, box)), f"sample {k}") for k, picture in enumerate(painted)]

    # ------------------------------------------------------------ surprise

    @cached_property
    def judge(self) -> Judge:
        surprise = surprise_of(self.trained, device=str(self.device))
        return judge_of(surprise, self.trained, self.source, view_of(self.trained, self.source), USUAL)

    def surprise(self, looked: Looked) -> tuple[Image.Image, str]:
        """Where an image is unusual, and how its most unusual patch compares. Raises UserError where nothing is predicted."""
        _, unusual, scores = self.judge(looked.seen[None])
        usual = self.judge.usual.scores
        text = f"{scores[0]:.1f} at most, above that of {100 * (usual < scores[0]).mean():.0f} % of {len(usual)} images"
        return self.heat(looked, torch.from_numpy(unusual[0]), *pictures.ends(usual)), text

    # ------------------------------------------------------------ patches

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.trained.method.product, self.trained.normalise, self.trained.method.product_name()).to(
            self.device
        )

    @cached_property
    def basis(self) -> Tensor:
        return patches_of(self.encoder, self.images[:BASIS])

    @cached_property
    def palette(self) -> Palette:
        return Palette.of(self.basis)

    def colours(self, looked: Looked) -> Image.Image:
        """The patches of an image, each by its three principal components."""
        found = self.palette(patches_of(self.encoder, looked.seen[None]))[0].reshape(*self.grid, 3)
        small = Image.fromarray((255 * found).round().astype("uint8"))
        return small.resize((looked.shown.shape[2], looked.shown.shape[1]), Image.Resampling.NEAREST)

    def like(self, looked: Looked, row: int, column: int) -> Image.Image:
        """Where an image is like one of its patches."""
        features = patches_of(self.encoder, looked.seen[None])
        found = likeness(features, 0, row * self.grid[1] + column, self.basis.mean(0))[0]
        return self.heat(looked, found.view(self.grid), 0.0, 1.0, (row, column))

    def clickable(self, looked: Looked) -> Image.Image:
        """The image, larger than a page shows it: Gradio tells clicks wrongly on pictures that are magnified."""
        height, width = looked.shown.shape[1:]
        scale = CLICKABLE / max(height, width)
        return draw(Cell(looked.shown)).resize((round(scale * width), round(scale * height)))

    def patch_at(self, looked: Looked, x: int, y: int) -> Grid:
        """The patch that a pixel of the clickable image lies in."""
        scale = max(looked.shown.shape[1:]) / CLICKABLE
        height, width = looked.shown.shape[1:]
        row, column = int(y * scale * self.grid[0] / height), int(x * scale * self.grid[1] / width)
        return min(max(row, 0), self.grid[0] - 1), min(max(column, 0), self.grid[1] - 1)

    def heat(self, looked: Looked, values: Tensor, low: float, high: float, patch: Grid | None = None) -> Image.Image:
        pixels = pictures.heated(figures.to_pixels(looked.shown), values.numpy(), low, high)
        tensor = as_tensor((255 * pixels).round().astype("uint8"))
        place = self.place(looked, (*patch, 1, 1)) if patch else None
        return draw(Cell(tensor, place.box if place else None))

    # ------------------------------------------------------------ search

    @cached_property
    def table_pictures(self) -> Pictures:
        assert self.table
        return Pictures(self.table, None)

    def search(self, looked: Looked, place: Place | None) -> Captioned:
        """The images of the table that are most like an image, or like what is in its block. Raises UserError."""
        if self.table is None or self.looker is None:
            raise UserError("no table was given: openjepa studio RUN --table features.parquet")
        region = self.region(looked, place) if place else None
        if region and not self.table.of_patches:
            raise UserError(
                "this table holds whole images: a block is looked for among patches (openjepa embed --pool patches)"
            )
        asked = of_image(self.looker, self.table, looked.raw, looked.name, region)
        hits = neighbours(self.table, asked.vector, min(FOUND, self.table.about["held"]))
        return [tiled(self.table_pictures.tile(hit)) for hit in hits]

    def region(self, looked: Looked, place: Place) -> Region:
        """The block in pixels of the image as it came."""
        left, top, right, bottom = self.window(looked)
        own = Place((left, top, right, bottom), self.grid, place.rows, place.columns).box
        return Region(box=(own[0], own[1], max(1, own[2] - own[0]), max(1, own[3] - own[1])))

    def window(self, looked: Looked) -> Box:
        return looked.view.box(*looked.size)

    # ------------------------------------------------------------ training

    def log(self) -> float:
        """When something was last logged."""
        file = self.trained.run / "metrics.jsonl"
        return file.stat().st_mtime if file.exists() else 0.0

    def curves(self) -> tuple[Image.Image | None, list[tuple[str, str]]]:
        """The curves of a run, which may still go on, and its last numbers."""
        metrics = read_metrics(self.trained.run)
        if not metrics:
            return None, [("", "nothing has been logged yet")]
        numbers = {k: v for k, v in latest(metrics).items() if isinstance(v, (int, float))}
        said = [(k.replace("_", " "), spoken(v) if k == "elapsed_s" else f"{v:.5g}") for k, v in numbers.items()]
        return drawn(figures.curves_figure(metrics, read_metrics(self.trained.run / FIRST))), said


def source_of(trained: Trained, data: str | None) -> Source:
    """The images to choose from. Raises UserError."""
    size = trained.recipe.model.image_size
    if data:
        return open_source(data, size)
    try:
        return own_images(trained.run, size)
    except UserError as error:
        raise UserError(f"{error}: name some, --data SPEC") from error


def as_tensor(pixels) -> Tensor:  # type: ignore[no-untyped-def]
    """uint8 [H, W, C] to [C, H, W]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def tiled(tile: Tile) -> tuple[Image.Image, str]:
    """A found image with its part framed, and what is said of it."""
    pixels = as_tensor(tile.pixels)
    h, w = pixels.shape[1:]
    box = None
    if tile.part:
        x, y, wide, tall = tile.part
        box = (round(x * w), round(y * h), round((x + wide) * w), round((y + tall) * h))
    return draw(Cell(pixels, box)), " · ".join(line for line in tile.lines if line)

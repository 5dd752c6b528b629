"""A contact sheet: images in rows, with a line or two under each, a part of one framed where that is what is meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from openjepa.see.figures import BLUE, INK, ORANGE

LONGEST = 22  # characters of a line


@dataclass(frozen=True)
class Tile:
    """pixels: uint8 [H, W, C]. part: left, top, width and height of a frame, as shares of the image. asked: it is the question."""

    pixels: np.ndarray
    lines: Sequence[str] = ()
    part: tuple[float, float, float, float] | None = None
    asked: bool = False


def contact_sheet(rows: Sequence[Sequence[Tile]]) -> Figure:
    """Rows of tiles, of which some may be shorter."""
    columns = max(len(row) for row in rows)
    height, width = rows[0][0].pixels.shape[:2]
    words = max(len(tile.lines) for row in rows for tile in row)
    figure = Figure(figsize=(1.5 * columns, (1.5 * height / width + 0.16 * words + 0.06) * len(rows)))
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            draw(axes[i][j], tile)
    return figure


def draw(axis, tile: Tile) -> None:  # type: ignore[no-untyped-def]  # matplotlib's
    height, width, channels = tile.pixels.shape
    if channels == 1:
        axis.imshow(tile.pixels[..., 0], cmap="gray", vmin=0, vmax=255)
    else:
        axis.imshow(tile.pixels[..., :3])
    axis.set_xlabel("\n".join(short(line) for line in tile.lines), fontsize=7, color=INK, parse_math=False)
    if tile.part:
        x, y, w, h = tile.part
        frame = (x * width - 0.5, y * height - 0.5), w * width, h * height
        axis.add_patch(Rectangle(*frame, fill=False, edgecolor="white", linewidth=3, clip_on=False))
        axis.add_patch(Rectangle(*frame, fill=False, edgecolor=ORANGE, linewidth=1.5, clip_on=False))
    if tile.asked:
        axis.spines[:].set(visible=True, color=BLUE, linewidth=2)


def short(line: str) -> str:
    """The end of a line that is too long: of a path, its name."""
    return line if len(line) <= LONGEST else "…" + line[1 - LONGEST :]

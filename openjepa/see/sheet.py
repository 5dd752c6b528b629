"""Images in rows: small ones magnified by whole numbers, large ones shrunk, boxes outlined around their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST = 128  # pixels a side that an image is magnified to, about
LARGEST = 1024  # pixels a side that an image is shrunk to
LETTERS = 12  # pixels that the line above is high at least, and a twentieth of the cells: read where all of a large sheet is shown
GREEN = (0, 170, 80)


@dataclass(frozen=True)
class Cell:
    """pixels: uint8 [C, H, W]; box: left, top, right, bottom, to be outlined."""

    pixels: Tensor
    box: tuple[int, int, int, int] | None = None


def sheet(rows: Sequence[Sequence[Cell]], heads: Sequence[str]) -> Image.Image:
    """All cells on white, a row below a row, columns named above."""
    side = max(max(cell.pixels.shape[1:]) for row in rows for cell in row)
    drawn = [[draw(cell, side) for cell in row] for row in rows]
    columns = [max(row[i].width for row in drawn if i < len(row)) for i in range(max(map(len, drawn)))]
    heights = [max(image.height for image in row) for row in drawn]
    letters = max(LETTERS, max(heights) // 20)
    gap, above = letters // 2, letters * 3 // 2
    size = (sum(columns) + gap * (len(columns) + 1), above + sum(heights) + gap * (len(heights) + 1))
    result = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(result), ImageFont.load_default(letters)
    x = gap
    for width, head in zip(columns, heads, strict=False):
        pen.text((x, letters // 3), head, fill=(70, 74, 82), font=font)
        x += width + gap
    y = above + gap
    for row, height in zip(drawn, heights, strict=True):
        x = gap
        for image, width in zip(row, columns, strict=False):
            result.paste(image, (x, y))
            x += width + gap
        y += height + gap
    return result


def draw(cell: Cell, side: int = 0) -> Image.Image:
    """A cell, about as large as one of `side` pixels. The outline lies outside of the box, or on the image's border."""
    pixels = cell.pixels[:3] if len(cell.pixels) >= 3 else cell.pixels[:1].expand(3, -1, -1)
    longer = max(pixels.shape[1:])
    whole = max(1, round(min(max(SMALLEST, side), LARGEST) / longer))
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()).repeat(whole, 0).repeat(whole, 1))
    times = float(whole)
    if longer > LARGEST:
        times = LARGEST / longer
        image = image.resize((max(1, round(times * image.width)), max(1, round(times * image.height))), reducing_gap=2)
    if cell.box:
        left, top, right, bottom = (round(times * edge) for edge in cell.box)
        thick = max(1, min(image.size) // 100)
        edges = (
            max(0, left - thick),
            max(0, top - thick),
            min(image.width, right + thick),
            min(image.height, bottom + thick),
        )
        ImageDraw.Draw(image).rectangle((edges[0], edges[1], edges[2] - 1, edges[3] - 1), outline=GREEN, width=thick)
    return image

"""Pictures of what a decoder paints: the paper's figure, and hypotheses of what is in a box of an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from openjepa.data.decode import BadImage, Raw
from openjepa.data.sources import EXTENSIONS, open_source, read_file
from openjepa.decoder.paint import Sampling
from openjepa.decoder.place import Rectangle
from openjepa.errors import UserError, first_line
from openjepa.recipes.decoding import Decoder, Shown, hidden, hypotheses, load_decoder, refuse_none, show
from openjepa.see.files import MARK, refuse_picture
from openjepa.see.sheet import LARGEST, Cell, sheet


def sample(source: str, words: Sequence[str], decoder: str, out: Path, *, rows: int, samples: int, sampling: Sampling,
           box: Rectangle | None, device: str = "auto", each: bool = False) -> list[Path]:  # fmt: skip
    """The paper's figure: a row an image, its context, and samples in their place. Returns the files. Raises UserError."""
    refuse_none(rows=rows, samples=samples)
    refuse_pictures(out, words, rows * len(words) if each else 0)
    loaded = load_decoder(source, decoder, device)
    found = pictures(words, rows, loaded.trained.recipe.model.image_size)
    drawn, shown, painted = figure_of(loaded, found, samples, sampling, box)
    about = {**loaded.about(sampling), "images": [s.name for s in shown], "boxes": [list(s.place.box) for s in shown]}
    return save(out, drawn, painted, about, each)


def figure_of(decoder: Decoder, found: Sequence[tuple[str, Raw]], samples: int, sampling: Sampling,
              box: Rectangle | None = None) -> tuple[Image.Image, list[Shown], list[Tensor]]:  # fmt: skip
    """The paper's figure of some images by their names, what was shown of each, and its samples. Raises UserError."""
    shown = [show(decoder, name, raw, box, i, sampling.seed) for i, (name, raw) in enumerate(found)]
    painted = hypotheses(decoder, shown, samples, sampling)
    of = decoder.recipe.rcdm.of
    second = {"prediction": "context", "block": "block"}.get(of)  # the oracle sees all of it
    cells = []
    for s, made in zip(shown, painted, strict=True):
        outline = s.place.box if second else None
        told = [Cell(hidden(s) if of == "prediction" else s.pixels, outline)] if second else []
        cells.append([Cell(s.pixels), *told, *(Cell(picture, outline) for picture in made)])
    heads = ["original", *([second] if second else []), *(f"sample {k}" for k in range(samples))]
    return sheet(cells, heads), shown, painted


def complete(source: str, image: str, decoder: str, out: Path, *, samples: int, sampling: Sampling, box: Rectangle,
             device: str = "auto", each: bool = False) -> list[str]:  # fmt: skip
    """Hypotheses of what is in a box of an image, side by side, at most LARGEST pixels a side each. Returns what to tell.

    Raises UserError.
    """
    refuse_none(samples=samples)
    refuse_pictures(out, [image], int(each))
    loaded = load_decoder(source, decoder, device)
    if loaded.recipe.rcdm.of != "prediction":
        raise UserError(
            f"{decoder} paints from what the encoder sees of the {loaded.recipe.rcdm.of}, which is not there: completing takes a "
            "decoder of predictions (--rcdm.of prediction)"
        )
    shown = show(loaded, image, read_picture(image), box, 0, sampling.seed)
    (painted,) = hypotheses(loaded, [shown], samples, sampling)
    cells = [Cell(hidden(shown), shown.place.box), *(Cell(picture) for picture in painted)]
    drawn = sheet([cells], ["given", *(f"hypothesis {k}" for k in range(samples))])
    about = {**loaded.about(sampling), "images": [image], "boxes": [list(shown.place.box)]}
    files = save(out, drawn, [painted], about, each)
    left, top, right, bottom = shown.place.box
    lines = [f"written: {files[0]}" + (f" and {samples} hypotheses beside it" if each else "")]
    if max(shown.pixels.shape[1:]) > LARGEST:
        lines.append(f"note: shown at {LARGEST} pixels a side; --each writes each hypothesis at the image's own size")
    if shown.place.box != (box[0], box[1], box[0] + box[2], box[1] + box[3]):
        lines.append(f"note: the box was widened to whole patches: {left},{top},{right - left},{bottom - top}")
    low, high = loaded.recipe.masking.target_scale
    if not 0.5 * low <= shown.place.share <= 1.5 * high:
        lines.append(
            f"note: the box is {shown.place.share:.0%} of what the encoder sees, and the decoder learned blocks of {low:.0%} to "
            f"{high:.0%}: expect less"
        )
    return lines


def save(out: Path, drawn: Image.Image, painted: Sequence[Tensor], about: dict[str, Any], each: bool) -> list[Path]:
    """The figure, and with `each` every sample as a file of its own beside it. Raises UserError."""
    files = [(out, drawn, about)]
    if each:
        for i, pictures_ in enumerate(painted):
            for k, picture in enumerate(pictures_):
                own = {**about, "image": about["images"][i], "sample": k}
                files.append((out.with_name(f"{out.stem}-{i}-{k}.png"), to_image(picture), own))
    for file, image, said in files:
        info = PngInfo()
        info.add_text(MARK, json.dumps(said))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file, "PNG", pnginfo=info)
        except OSError as error:
            raise UserError(f"cannot write {file}: {first_line(error)}") from error
    return [file for file, *_ in files]


def to_image(pixels: Tensor) -> Image.Image:
    """uint8 [C, H, W] of 1, 3 or 4 channels."""
    return Image.fromarray(
        pixels.permute(1, 2, 0).numpy().squeeze(-1) if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    )


def pictures(words: Sequence[str], rows: int, size: tuple[int, int]) -> list[tuple[str, Raw]]:
    """Image files, and the first images of what a SPEC names, `rows` of them. Raises UserError."""
    found: list[tuple[str, Raw]] = []
    for word in words:
        path = Path(word)
        if path.suffix.lower() in EXTENSIONS or (path.is_file() and path.suffix not in (".parquet", ".tar")):
            found.append((word, read_picture(word)))
            continue
        source = open_source(word, size)
        for index in range(min(rows, len(source))):
            try:
                found.append((source.name(index), source.read(index)))
            except (BadImage, OSError) as error:
                raise UserError(f"{source.name(index)}: {first_line(error)}") from error
    return found


def refuse_pictures(out: Path, reads: Sequence[str], each: int) -> None:
    """Raises UserError for a place where no PNG can be written, or that holds another's, before anything is painted.

    reads: the images asked about. each: of how many images every sample is written, too.
    """
    others = [file for i in range(each) for file in out.parent.glob(f"{out.stem}-{i}-*.png")]
    for file in (out, *others):
        refuse_picture(file, "--out", reads)


def read_picture(word: str) -> bytes:
    try:
        return read_file(word)
    except (BadImage, OSError) as error:
        raise UserError(f"{word}: {first_line(error)}") from error

"""Decoders of runs: trained, and asked for samples, completions and whether they are true."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openjepa import __version__
from openjepa.data.decode import BadImage, Raw, decode
from openjepa.data.sources import EXTENSIONS, open_source, read_file
from openjepa.decoder.faithful import METRICS, OWN, POSITIONS, RANDOM, REAL, Faithfulness, faithfulness
from openjepa.decoder.paint import Sampling, paint
from openjepa.decoder.place import Place, Rectangle, paste, snapped
from openjepa.decoder.rcdm import RCDM, RCDMConfig
from openjepa.engine import checkpoint
from openjepa.engine.device import pick_device
from openjepa.engine.whole import write_whole
from openjepa.errors import UserError, first_line
from openjepa.evaluate.features import Images, View, readable
from openjepa.evaluate.scores import Answer
from openjepa.masking import Masks
from openjepa.masking import sample as draw_masks
from openjepa.models.weights import load_strict
from openjepa.recipes.exchange import Trained, load_run
from openjepa.recipes.methods import decoder_of, refuse_another
from openjepa.recipes.pretrain import pretrain, saved_recipe
from openjepa.recipes.recipe import Recipe, override
from openjepa.rng import permutation
from openjepa.see.contact import MARK, refuse_picture
from openjepa.see.sheet import LARGEST, Cell, sheet

OF_THE_RUN = ("method", "model.", "data.mean", "data.std", "rcdm.run", "rcdm.step", "rcdm.fingerprint")

# ---------------------------------------------------------------- training


def recipe_for(base: Recipe, source: str, trained: Trained) -> Recipe:
    """A decoder's recipe around a run: its model, its sizes of blocks, its normalisation."""
    own = trained.recipe
    masking, augment = base.masking, base.augment
    if own.method == "ijepa" and own.masking.strategy == "multiblock":
        masking = replace(masking, target_scale=own.masking.target_scale, target_aspect=own.masking.target_aspect)
    if augment.crop_aspect == (1.0, 1.0):
        height, width = own.model.image_size
        augment = replace(augment, crop_aspect=(width / height, width / height))
    data = replace(base.data, mean=own.data.mean, std=own.data.std)
    rcdm = replace(base.rcdm, run=where(source), step=trained.step, fingerprint=trained.fingerprint())
    return replace(base, model=own.model, masking=masking, data=data, augment=augment, rcdm=rcdm)


def train(source: str, data: str, out: Path, base: Recipe | None, values: Mapping[str, str], console: Console) -> RCDM:
    """Train a decoder for a run, or go on with the one in `out`. base: None where that says it.

    Raises UserError, and Interrupted after a signal.
    """
    for name in values:
        if name.startswith(OF_THE_RUN):
            raise UserError(f"--{name} is what the run says, and no choice of its decoder's")
    trained = load_run(source)
    begun = saved_recipe(out) if (out / "recipe.yaml").exists() else None
    if begun:
        refuse_others(begun, str(out))
        refuse_another(begun.rcdm, trained)
    if base:
        refuse_others(base, "this recipe")
        base = recipe_for(base, source, trained)
    elif begun:
        base = replace(begun, rcdm=replace(begun.rcdm, run=where(source)))
    else:
        raise UserError("which recipe? give --recipe NAME (openjepa recipes lists them) or --config FILE.yaml")
    method = pretrain(override(base, values), data, out, console)
    assert isinstance(method, RCDM)
    return method


def where(source: str) -> str:
    return str(Path(source).absolute())


def refuse_others(recipe: Recipe, what: str) -> None:
    if recipe.method != "rcdm":
        raise UserError(
            f"{what} is of {recipe.method}, which is no decoder: openjepa decode train makes them, by recipes rcdm_…"
        )


# ---------------------------------------------------------------- asking


@dataclass(frozen=True)
class Decoder:
    """A trained decoder beside the run that it was made for, on a device."""

    trained: Trained
    recipe: Recipe
    method: RCDM
    step: int

    @property
    def device(self) -> torch.device:
        return self.method.device

    @torch.no_grad()
    def conditions(self, images: Tensor, masks: Masks) -> Tensor:
        """images: uint8 [B, C, H, W]. Returns float32 [B, D]."""
        return self.method.condition(self.method.normalise(images.to(self.device)), masks.to(self.device))

    def about(self, sampling: Sampling) -> dict[str, Any]:
        """What its pictures depend on."""
        return {
            "openjepa": __version__,
            "command": shlex.join(["openjepa", *sys.argv[1:]]),
            "run_fingerprint": self.recipe.rcdm.fingerprint,
            "run_step": self.trained.step,
            "decoder_step": self.step,
            "of": self.recipe.rcdm.of,
            "paint": self.recipe.rcdm.paint,
            "networks": self.recipe.rcdm.networks,
            **asdict(sampling),
        }


def load_decoder(source: str, decoder: str, device: str = "auto") -> Decoder:
    """A decoder and its run. Raises UserError where it was made for another."""
    folder, found = checkpoint.locate(Path(decoder))
    recipe = saved_recipe(folder)
    refuse_others(recipe, decoder)
    trained = load_run(source)
    method = decoder_of(recipe, trained)
    load_strict(method, found.weights(), str(found.path))
    return Decoder(trained, recipe, method.to(pick_device(device)).eval(), found.step)


@dataclass(frozen=True)
class Shown:
    """An image as it came, and where its block is. pixels: uint8 [C, H, W], upright; seen: what the encoder gets of it."""

    name: str
    pixels: Tensor
    seen: Tensor
    place: Place


def upright(raw: Raw, channels: int) -> np.ndarray:
    """All pixels of an image, uint8 [H, W, channels]. Raises BadImage."""
    size: list[tuple[int, int]] = []

    def whole(width: int, height: int) -> tuple[float, float, float, float]:
        size.append((height, width))
        return 0, 0, width, height

    decode(raw, whole, (1, 1), channels)
    return decode(raw, whole, size[0], channels)


def show(decoder: Decoder, name: str, raw: Raw, box: Rectangle | None, number: int, seed: int) -> Shown:
    """box: x, y, width, height in the image's pixels; without one a block of (seed, number) is drawn, as in training.

    Raises UserError.
    """
    model, recipe = decoder.trained.recipe.model, decoder.recipe
    try:
        pixels = upright(raw, model.channels)
    except BadImage as error:
        raise UserError(f"{name}: {error}") from error
    height, width = pixels.shape[:2]
    try:
        whole = snapped(box or (width // 2, height // 2, 1, 1), (width, height), model.grid, model.patch_size)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if box is None:
        masks = draw_masks(recipe.masking, model.grid, seed, 0, np.array([number]))
        rows, columns = np.divmod(masks.targets[0, 0].numpy(), model.grid[1])
        whole = replace(whole, rows=(int(rows[0]), int(rows[-1]) + 1), columns=(int(columns[0]), int(columns[-1]) + 1))
    seen = decode(pixels, lambda w, h: whole.window, model.image_size, model.channels)
    as_tensor = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in (pixels, seen)]
    return Shown(name, as_tensor[0], as_tensor[1], whole)


def hypotheses(decoder: Decoder, shown: Sequence[Shown], samples: int, sampling: Sampling) -> list[Tensor]:
    """Each image with each sample in its place, uint8 [K, C, H, W] of its own size; or, of a decoder that paints whole images,
    what the encoder sees painted anew."""
    conditions = torch.cat([decoder.conditions(s.seen[None], s.place.masks()) for s in shown])
    painted = paint(decoder.method, conditions, samples, sampling)
    return [placed(decoder, s, squares) for s, squares in zip(shown, painted, strict=True)]


def placed(decoder: Decoder, shown: Shown, squares: Tensor) -> Tensor:
    """Squares [K, C, S, S] from 0 to 1, put where they belong."""
    window = [round(side) for side in shown.place.window]
    whole = decoder.recipe.rcdm.paint == "image"
    box = (window[0], window[1], window[2], window[3]) if whole else shown.place.box
    return paste(shown.pixels[None].expand(len(squares), -1, -1, -1), squares, [box] * len(squares))


def hidden(shown: Shown) -> Tensor:
    """The image with its block grey, and pale where the encoder does not look."""
    left, top, right, bottom = shown.place.box
    result = shown.pixels.clone()
    seen = torch.zeros(result.shape[1:], dtype=torch.bool)
    x0, y0, x1, y1 = (round(side) for side in shown.place.window)
    seen[y0:y1, x0:x1] = True
    result[:3] = torch.where(seen, result[:3], (255 - (255 - result[:3].float()) * PALE).to(torch.uint8))
    result[:, top:bottom, left:right] = 128
    return result


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


def refuse_none(**counts: int) -> None:
    """Raises UserError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name} {count}: give 1 or more")


def refuse_no_png(out: Path, reads: Sequence[str], each: int) -> None:
    """Raises UserError for a place where no PNG can be written, or that holds another's, before anything is painted.

    reads: the images asked about. each: of how many images every sample is written, too.
    """
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--out {out}: give a file of the kind .png, which holds seeds and boxes beside the picture")
    others = [file for i in range(each) for file in out.parent.glob(f"{out.stem}-{i}-*.png")]
    for file in (out, *others):
        refuse_picture(file, "--out", reads)


def read_picture(word: str) -> bytes:
    try:
        return read_file(word)
    except (BadImage, OSError) as error:
        raise UserError(f"{word}: {first_line(error)}") from error


def sample(source: str, words: Sequence[str], decoder: str, out: Path, *, rows: int, samples: int, sampling: Sampling,
           box: Rectangle | None, device: str = "auto", each: bool = False) -> list[Path]:  # fmt: skip
    """The paper's figure: a row an image, its context, and samples in their place. Returns the files. Raises UserError."""
    refuse_none(rows=rows, samples=samples)
    refuse_no_png(out, words, rows * len(words) if each else 0)
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


def complete(source: str, image: str, decoder: str, out: Path, *, samples: int, sampling: Sampling, box: Rectangle,
             device: str = "auto", each: bool = False) -> list[str]:  # fmt: skip
    """Hypotheses of what is in a box of an image, side by side, at most LARGEST pixels a side each. Returns what to tell.

    Raises UserError.
    """
    refuse_none(samples=samples)
    refuse_no_png(out, [image], int(each))
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


# ---------------------------------------------------------------- is it true?

FAITHFULNESS = "faithfulness.json"
PALE = 0.3  # of its contrast that is left where the encoder does not look


def check(source: str, decoder: str, data: str, *, images: int, gallery: int, samples: int, sampling: Sampling,
          console: Console, control: str | None = None, out: Path | None = None, device: str = "auto") -> Path:  # fmt: skip
    """Measure whether samples are true to their conditions, beside controls; a table, and faithfulness.json. Raises UserError."""
    refuse_none(samples=samples)
    loaded = load_decoder(source, decoder, device)
    beside = load_decoder(source, control, device) if control else None
    if beside and (why := no_control(loaded.recipe.rcdm, beside.recipe.rcdm)):
        raise UserError(f"--control {control} {why}")
    file = (out or checkpoint.locate(Path(decoder))[0]) / FAITHFULNESS
    if not out and (more := larger_check(file, images * samples, bool(control))):
        raise UserError(f"{file} holds {more}: --out FOLDER for a smaller one")
    model = loaded.trained.recipe.model
    found = open_source(data, model.image_size)
    gallery = min(gallery, len(found))
    if not 2 * POSITIONS <= images <= gallery or images % POSITIONS:
        raise UserError(
            f"--images {images}: give a multiple of {POSITIONS}, {2 * POSITIONS} or more, and no more than the gallery of "
            f"{gallery} (--gallery; {data} has {len(found)} images)"
        )
    chosen = permutation(sampling.seed, "faithfulness", 0, len(found))[:gallery]
    seen = Images(found, chosen, View(model.image_size, model.channels))
    pixels, _ = readable(seen)
    if (gallery := len(pixels)) < images:
        raise UserError(f"{data}: {gallery} images of the gallery can be read, fewer than --images {images}")
    masks = draw_masks(loaded.recipe.masking, model.grid, sampling.seed, 0, np.arange(POSITIONS))
    result = faithfulness(
        loaded.method, pixels, masks, images, samples, sampling, beside.method if beside else None,
        lambda name: console.print(f"painting {images} x {samples} samples: {name} condition", highlight=False),
    )  # fmt: skip
    about = {**loaded.about(sampling), "data": data, "images": images, "samples": samples, "gallery": gallery}
    record = {
        **about,
        "metrics": METRICS,
        "chance": result.chance,
        "conditions": {name: plain(result.answers(name)) for name in result.values},
        "ahead": {name: plain(result.ahead(name)) for name in result.values if name not in (OWN, REAL)},
    }
    console.print(table_of(result, f"{decoder}: {images} images x {samples} samples, among {gallery} of {data}"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {first_line(error)}") from error
    return file


def larger_check(file: Path, samples: int, control: bool) -> str | None:
    """What a check that was kept had, and one of so many samples, with or without a control, would not have."""
    try:
        kept = json.loads(file.read_text())
        had = kept["images"] * kept["samples"]
        with_control = RANDOM in kept["conditions"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if had > samples or (with_control and not control):
        return f"a check of {kept['images']} images x {kept['samples']} samples" + " and a control" * with_control
    return None


def no_control(config: RCDMConfig, control: RCDMConfig) -> str | None:
    """Why one decoder is no control of another; None where it is."""
    if control.networks != "random":
        return "was trained on the run's own networks: train one with --rcdm.networks random"
    if (control.of, control.paint, control.size) != (config.of, config.paint, config.size):
        return (
            f"paints {control.paint} from {control.of} at {control.size} pixels, and the decoder {config.paint} from {config.of} "
            f"at {config.size}"
        )
    return None


def plain(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    return {a.metric: {"value": a.value, "interval": list(a.interval or ())} for a in answers}


def table_of(result: Faithfulness, title: str) -> Table:
    """A row a condition: the mean over images, and half the width of its 95 % interval."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    metrics = [metric for metric in result.values[OWN] if metric != "pixel_change"]  # in the file alone
    table.add_column("painted from", no_wrap=True)
    for words in (metric.split("_") for metric in metrics):
        table.add_column(" ".join(words), justify="right", min_width=max(map(len, words)), overflow="fold")
    for name in result.values:
        known = {a.metric: a for a in result.answers(name)}
        table.add_row(name, *(shown_answer(known.get(metric)) for metric in metrics))
    table.add_row("chance", *(f"{result.chance[m]:.3f}" if m in result.chance else "" for m in metrics))
    return table


def shown_answer(answer: Answer | None) -> str:
    if answer is None or answer.interval is None:
        return ""
    return told(answer.value, answer.interval)


def told(value: float, interval: Sequence[float]) -> str:
    """A value and half the width of its interval, to thousandths below 1."""
    digits = 3 if value < 1 else 1
    return f"{value:.{digits}f} ±{(interval[1] - interval[0]) / 2:.{digits}f}"

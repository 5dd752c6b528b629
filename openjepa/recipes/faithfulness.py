"""`openjepa decode check`: whether samples are true to what a decoder was told, beside controls; kept beside the decoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from openjepa.data.sources import open_source
from openjepa.decoder.faithful import METRICS, OWN, POSITIONS, RANDOM, REAL, Faithfulness, faithfulness
from openjepa.decoder.paint import Sampling
from openjepa.decoder.rcdm import RCDMConfig
from openjepa.engine import checkpoint
from openjepa.engine.whole import write_whole
from openjepa.errors import UserError, first_line
from openjepa.evaluate.features import View, readable
from openjepa.evaluate.scores import Answer
from openjepa.masking import sample as draw_masks
from openjepa.recipes.decoding import load_decoder, refuse_none
from openjepa.rng import permutation

FAITHFULNESS = "faithfulness.json"
TABLED = tuple(metric for metric in METRICS if metric != "pixel_change")  # which is in the file alone


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
    pixels, _ = readable(found, chosen, View(model.image_size, model.channels))
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
    metrics = [metric for metric in TABLED if metric in result.values[OWN]]
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

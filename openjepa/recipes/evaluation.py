"""Evaluate an encoder beside random weights and raw pixels; the answers are kept in evaluation.json."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openjepa.data.sources import open_source
from openjepa.engine import checkpoint, parallel
from openjepa.engine.device import Precision, pick_autocast, pick_device, pick_precision
from openjepa.engine.run import environment, write_whole
from openjepa.errors import UserError, first_line, nearest
from openjepa.evaluate import suite
from openjepa.evaluate.features import View
from openjepa.evaluate.suite import Asked, Bench
from openjepa.models.encoder import Encoder
from openjepa.models.vit import ViT
from openjepa.recipes.exchange import is_run, load
from openjepa.recipes.pretrain import random_encoder, saved_recipe
from openjepa.recipes.recipe import from_dict, nested

FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What `openjepa evaluate` is asked."""

    source: str  # a run, a checkpoint, or anything that load takes
    train: str
    test: str
    protocols: Sequence[str] = ("knn", "linear")
    network: str | None = None
    out: Path | None = None  # of evaluation.json: the run, unless told
    image_size: tuple[int, int] | None = None
    share: float = 1.0
    squash: bool = False
    device: str = "auto"
    seed: int = 0
    fresh: bool = False


def evaluate(question: Question, values: Mapping[str, str], console: Console) -> Path:
    """Ask, print the table, add the answers to evaluation.json. values: --linear.epochs and the like. Returns the file.

    Raises UserError.
    """
    start = time.perf_counter()
    protocols = asked(question.protocols, values)
    encoder, control, about = subjects(question)
    folder = question.out or (about["run"] if about["run"] else None)
    if folder is None:
        raise UserError(f"{question.source} is not a run: say where the answers go, --out DIR")
    known = read(folder)
    config = encoder.vit.config
    size = question.image_size or config.image_size
    if size != config.image_size:
        encoder, control = encoder.resized(size), control.resized(size)
    precision = pick_precision(about["precision"], device := pick_device(question.device))
    bench = Bench(
        train=open_source(question.train, size),
        test=open_source(question.test, size),
        view=View(size, config.channels, question.share, question.squash),
        device=device,
        precision=precision,
        autocast=pick_autocast(precision, device),
        workers=min(8, os.cpu_count() or 1) if device.type == "cuda" else 0,
        share=(parallel.rank(), parallel.world_size()),
        seed=question.seed,
        fresh=question.fresh,
    )
    records = suite.evaluate({"pretrained": encoder, "random weights": control}, bench, protocols, known, console)
    command = " ".join(["openjepa", *sys.argv[1:]])
    more = {"train": question.train, "test": question.test, "network": encoder.network, "step": about["step"]}
    records = [{**more, "command": command, **r} for r in records]
    seconds = time.perf_counter() - start
    write(folder, records, known)
    of = f"{encoder.network} of {question.source}" + (f" at step {about['step']}" if about["step"] is not None else "")
    console.print(suite.table(records, f"{of}, {question.test}"))
    console.print(f"written to {folder / FILE} after {seconds:.0f} s", highlight=False, soft_wrap=True)
    return folder / FILE


def subjects(question: Question) -> tuple[Encoder, Encoder, dict[str, Any]]:
    """The encoder, its control with random weights, and what is known of the run it comes from."""
    encoder = load(question.source, question.network)
    if is_run(Path(question.source)):
        folder, found = checkpoint.locate(Path(question.source))
        recipe = saved_recipe(folder)
        return encoder, random_encoder(recipe), {"run": folder, "step": found.step, "precision": recipe.precision}
    torch.manual_seed(question.seed)
    vit = ViT(encoder.vit.config).eval().requires_grad_(False)
    precision: Precision = "auto"
    return encoder, Encoder(vit, encoder.normalise, "random weights").eval(), {
        "run": None, "step": None, "precision": precision}  # fmt: skip


def asked(names: Sequence[str], values: Mapping[str, str]) -> list[Asked]:
    """Protocols by name, their values changed by dotted keys: {"linear.epochs": "5"}. Raises UserError."""
    for name in names:
        if name not in suite.PROTOCOLS:
            choices = ", ".join(suite.PROTOCOLS)
            raise UserError(f"unknown protocol '{name}': one of {choices}{nearest(name, suite.PROTOCOLS)}")
    kinds = {name: name.partition(":")[0] for name in names}
    trees = nested(values)
    for path in values:
        if path.partition(".")[0] not in kinds.values() or "." not in path:
            raise UserError(f"--{path} belongs to none of the protocols asked for: {', '.join(names)}")
    protocols = [suite.PROTOCOLS[name] for name in dict.fromkeys(names)]
    return [
        replace(p, config=from_dict(type(p.config), trees.get(kinds[p.name], {}), kinds[p.name], base=p.config))
        for p in protocols
    ]


def read(folder: Path) -> list[dict[str, Any]]:
    """The answers that a folder holds, none if there is no file. Raises UserError for a damaged one."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(file.read_text())["results"]
        return [record for record in found if "question" in record]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): move it away") from error


def write(folder: Path, records: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]) -> None:
    """New answers take the place of old ones to the same question, and of the same data by older weights."""
    place = ("train", "test", "network", "image_size", "task", "protocol", "of", "metric")
    merged = {json.dumps([r[name] for name in place]): r for r in (*known, *records)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment(), "results": list(merged.values())}, indent=1)
        write_whole(folder / FILE, text + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error

"""Evaluate an encoder beside random weights and raw pixels; the answers are kept in evaluation.json."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from openjepa.data.sources import first_use, open_source
from openjepa.engine import checkpoint, parallel
from openjepa.engine.device import Precision, pick_autocast, pick_device, pick_precision
from openjepa.engine.whole import refuse_unwritable
from openjepa.errors import UserError, nearest
from openjepa.evaluate import answers, suite
from openjepa.evaluate.features import View
from openjepa.evaluate.protocols import PROTOCOLS, Asked
from openjepa.evaluate.subjects import Bench
from openjepa.models.encoder import Encoder
from openjepa.models.layers import compile_blocks
from openjepa.models.vit import Tokens, ViT
from openjepa.recipes.exchange import is_run, load
from openjepa.recipes.pretrain import random_encoder, saved_recipe
from openjepa.recipes.recipe import flat, from_dict, nested
from openjepa.recipes.suites import SUITES, Found, Row, find


@dataclass(frozen=True, kw_only=True)
class Question:
    """What `openjepa evaluate` is asked: of one pair of sets, of sets by their names, or a suite."""

    source: str  # a run, a checkpoint, or anything that load takes
    train: str | None = None
    test: str | None = None
    sets: Sequence[str] = ()
    suite: str | None = None
    root: Path | None = None  # where sets lie by their names
    protocols: Sequence[str] | None = None  # none: a suite's own, or k-NN and linear
    tasks: Sequence[str] | None = None
    network: str | None = None
    tokens: Tokens = "patches"  # that whole images' features are of
    out: Path | None = None  # of evaluation.json: the run, unless told
    image_size: tuple[int, int] | None = None
    share: float | None = None  # none: the set's, or all
    squash: bool = False
    precision: Precision | None = None  # none: the run's
    device: str = "auto"
    seed: int = 0
    fresh: bool = False
    workers: int | None = None  # processes that load images; none: beside a GPU up to 8
    compile: bool = False  # the blocks, where the images are so many that it pays


@dataclass(frozen=True)
class Part:
    """One pair of sets and what is asked about it."""

    data: Found
    protocols: Sequence[str]
    tasks: Sequence[str] | None = None
    table: str = ""


def evaluate(question: Question, values: Mapping[str, str], console: Console) -> Path:
    """Ask, print the tables, keep every answer in evaluation.json as it comes. values: --linear.epochs and the like.

    Returns the file. Raises UserError, once what was answered by then is shown; in a suite it is said, and the others go on.
    """
    start = time.perf_counter()
    parts, skipped = planned(question)
    rows: list[Part | Row] = [*SUITES[question.suite]] if question.suite else [*parts]  # those without data, too
    protocols = {p.name: p for p in asked(list(dict.fromkeys(n for row in rows for n in row.protocols)), values)}
    encoder, control, about = subjects(question)
    folder = question.out or (about["run"] if about["run"] else None)
    if folder is None:
        raise UserError(f"{question.source} is not a run: say where the answers go, --out DIR")
    refuse_unwritable(folder)
    known = answers.read(folder)
    size = question.image_size or encoder.vit.config.image_size
    if size != encoder.vit.config.image_size:
        encoder, control = encoder.resized(size), control.resized(size)
    encoders = {"pretrained": encoder, "random weights": control}
    if question.compile:
        compile_blocks(encoder.vit.blocks, control.vit.blocks)
    precision = pick_precision(question.precision or about["precision"], device := pick_device(question.device))
    command = shlex.join(["openjepa", *sys.argv[1:]])
    records: list[dict[str, Any]] = []
    failure: UserError | None = None
    for part in parts:
        try:
            bench = laid(question, part, encoder, size, device, precision)
            more = {"train": part.data.train, "test": part.data.test, "network": encoder.network, "tokens": question.tokens,
                    "step": about["step"], "table": part.table}  # fmt: skip
            asking = [protocols[name] for name in part.protocols]
            for found in suite.evaluate(encoders, bench, asking, known, console, part.tasks):
                records += [{"command": command, **answer, **more} for answer in found]
                answers.write(folder, records, skipped)
        except UserError as error:
            if not question.suite:
                failure = error
                break
            skipped[f"{part.data.name}: {', '.join(part.protocols)}"] = str(error)
    seconds = time.perf_counter() - start
    if parallel.launched()[0] > 0 and not failure:
        return folder / answers.FILE
    part_of = "class token, " if question.tokens == "class" else ""
    of = f"{part_of}{encoder.network} of {question.source}" + (
        f" at step {about['step']}" if about["step"] is not None else ""
    )
    for test in dict.fromkeys(r["test"] for r in records):
        console.print(suite.table([r for r in records if r["test"] == test], f"{of}, {test}"))
    if failure:
        raise failure  # after what was answered before it
    for what, reason in skipped.items():
        console.print(f"skipped {what}: {reason}", style="yellow", highlight=False, soft_wrap=True)
    if not records:
        raise UserError("nothing could be asked")
    answers.write(folder, records, skipped)
    console.print(f"written to {folder / answers.FILE} after {seconds:.0f} s", highlight=False, soft_wrap=True)
    return folder / answers.FILE


def planned(question: Question) -> tuple[list[Part], dict[str, str]]:
    """What is to be asked, and what of a suite cannot be, with the reason. Raises UserError."""
    given, train, test = bool(question.train or question.test), question.train, question.test
    asked_for = [PROTOCOLS[name] for name in question.protocols or () if name in PROTOCOLS]
    if asked_for and all(protocol.kind == "none" for protocol in asked_for):
        test = test or train  # of which nothing is asked
    if given and not (train and test):
        raise UserError("give both sets: --train SPEC and --test SPEC")
    if question.suite and question.suite not in SUITES:
        raise UserError(
            f"unknown suite '{question.suite}': one of {', '.join(SUITES)}{nearest(question.suite, SUITES)}"
        )
    if question.suite and (question.sets or question.protocols):
        raise UserError("a suite brings its own sets and protocols: give --suite alone, or --sets and --protocols")
    if given and question.sets:
        raise UserError("give --train and --test, or --sets by name")
    if not given and not question.sets and not question.suite:
        raise UserError("evaluate on what? --train SPEC --test SPEC, or --sets NAMES, or --suite NAME")
    if question.root and not question.root.is_dir():
        raise UserError(f"--root {question.root}: no such folder")
    own = Found("the sets given", train or "", test or "", 1.0)
    if not question.suite:
        found = [own] if given else [find(name, question.root) for name in question.sets]
        return [Part(data, question.protocols or ("knn", "linear"), question.tasks) for data in found], {}
    parts, skipped = [], {}
    for row in SUITES[question.suite]:
        try:
            data = own if given and row.data == "imagenet" else find(row.data, question.root, fetch=False)
            table = row.table if data.name in (row.data, own.name) else f"{row.table}, {data.name}"
            parts.append(Part(data, row.protocols, row.tasks, table))
        except UserError as error:
            skipped[f"{row.data}: {', '.join(row.protocols)}"] = str(error)
    return parts, skipped


def laid(question: Question, part: Part, encoder: Encoder, size: tuple[int, int], device: torch.device,
         precision: Precision) -> Bench:  # fmt: skip
    """The bench for one pair of sets. Raises UserError."""
    if (workers := question.workers) is not None and workers < 0:
        raise UserError(f"--workers is {workers}: it must not be negative")
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    train, test = open_source(part.data.train, size), open_source(part.data.test, size)
    for source in (train, test) if workers else ():
        first_use(source)
    squash = question.squash or train.whole
    share = question.share if question.share is not None else part.data.share
    config = encoder.vit.config
    return Bench(
        train=train,
        test=test,
        view=View(size, config.channels, 1.0 if squash else share, squash),
        patch=config.patch_size,
        device=device,
        precision=precision,
        autocast=pick_autocast(precision, device),
        tokens=question.tokens,
        workers=workers,
        share=parallel.launched(),
        seed=question.seed,
        fresh=question.fresh,
    )


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
        if name not in PROTOCOLS:
            choices = ", ".join(PROTOCOLS)
            raise UserError(f"unknown protocol '{name}': one of {choices}{nearest(name, PROTOCOLS)}")
    kinds = {name: name.partition(":")[0] for name in names}
    for path in values:
        if path.partition(".")[0] not in kinds.values() or "." not in path:
            raise UserError(f"--{path} belongs to none of the protocols asked for: {', '.join(names)}")
    trees = nested(values)
    return [with_values(PROTOCOLS[name], trees.get(kind, {}), kind, names) for name, kind in kinds.items()]


def with_values(protocol: Asked, tree: Mapping[str, Any], kind: str, names: Sequence[str]) -> Asked:
    """A protocol with other values; those of another one of its kind that is asked, too, are left to that. Raises UserError."""
    own = {f.name for f in fields(protocol.config)}
    alike = {f.name for name in names if name.partition(":")[0] == kind for f in fields(PROTOCOLS[name].config)}
    mine = {key: value for key, value in tree.items() if key in own or key not in alike}
    config = from_dict(type(protocol.config), mine, kind, base=protocol.config)
    before, after = flat(asdict(protocol.config)), flat(asdict(config))
    changed = ", ".join(f"{key} {value}" for key, value in after.items() if before[key] != value)
    return replace(protocol, config=config, changed=changed)

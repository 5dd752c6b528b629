"""`openjepa bench compare`: methods on the same images, with the same encoder, for the same time (the paper's figures 1 and 5).

Each contestant first shows its pace, then gets as many steps as the budget holds, its schedule stretched over them; where a
run comes first, both share the time as the recipe has it. It is looked at several times on the way; looking does not count.
Beside all of them stand random weights and raw pixels. What a contestant has shown is kept, so that a comparison that was
stopped goes on with the next.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from openjepa.bench.clock import Rows
from openjepa.data.order import epoch_order
from openjepa.data.sources import Source, open_source
from openjepa.data.stream import steps_per_epoch
from openjepa.engine.checkpoint import checkpoints
from openjepa.engine.device import TrainingPrecision, pick_autocast, pick_device, pick_precision
from openjepa.engine.run import read_metrics
from openjepa.errors import Diverged, UserError, first_line, nearest
from openjepa.evaluate.features import EncoderFeatures, Extractor, Features, Images, PixelFeatures, View, extract
from openjepa.evaluate.knn import knn_predict
from openjepa.evaluate.linear import LinearConfig, Probe
from openjepa.evaluate.subjects import Task, class_tasks
from openjepa.models.encoder import Encoder
from openjepa.models.vit import Tokens
from openjepa.recipes.budget import pace, seconds_of, stretched
from openjepa.recipes.exchange import load
from openjepa.recipes.methods import METHODS
from openjepa.recipes.named import RECIPES
from openjepa.recipes.pretrain import pretrain, random_encoder, share_of
from openjepa.recipes.recipe import Recipe, differing_encoders, override

SCORES = ("knn", "linear")  # of a look
# what no contestant can set: the comparison does
OWN = ("seed", "monitors.log_every", "monitors.knn_every", "machine.checkpoint_every", "machine.keep")
COMPARABLE = [name for name in RECIPES if not name.startswith("rcdm")]  # a decoder trains no encoder
ENTERED = {"ijepa": "ijepa_cifar10_alone_cpu", "mae": "mae_cifar10_cpu", "ibot": "ibot_cifar10_cpu"}  # by their method
LOOKS = "5"  # at each run, unless told
MOODY = 0.1  # of the budget, by which what a contestant took may differ unsaid
LABELLED, TESTED = 10_000, 5_000  # most images that a look uses
K = 20
PROBE = LinearConfig(
    features=("concat4",), lrs=(0.01, 0.03, 0.1, 0.3), decays=(0.0,), epochs=20, min_steps=300
)  # for a look


@dataclass(frozen=True)
class Contestant:
    """A recipe by the name that it was asked for."""

    name: str
    recipe: Recipe


def contestants(words: Sequence[str], values: Mapping[str, str]) -> list[Contestant]:
    """mae, or ijepa_scenes, or ijepa:loss.target=pixels:masking.targets=2. values: changes to all. Raises UserError."""
    if len(set(words)) < len(words):
        raise UserError("--methods: name each once")
    found = []
    for word in words:
        name, *changes = split(word, ":")
        known = ENTERED.get(name, name)
        if known not in COMPARABLE:
            raise UserError(
                f"--methods {word}: '{name}' is neither a method nor a recipe{nearest(name, [*ENTERED, *COMPARABLE])} "
                f"({', '.join(ENTERED)}; openjepa recipes lists others)"
            )
        if wrong := [c for c in changes if "=" not in c]:
            raise UserError(f"--methods {word}: '{wrong[0]}' is no key=value")
        own = dict(change.split("=", 1) for change in changes)
        if len(own) < len(changes):
            raise UserError(f"--methods {word}: a key is given twice")
        if taken := [key for key in (*values, *own) if key in OWN]:
            raise UserError(f"{taken[0]} is the comparison's own" + ("; give --seeds" if taken[0] == "seed" else ""))
        try:
            recipe = override(RECIPES[known](), {**values, **own})
        except UserError as error:
            raise UserError(f"--methods {word}: {error}") from error
        if recipe.init_from:
            raise UserError(f"--methods {word}: it begins with {recipe.init_from}, whose time would not count")
        found.append(Contestant(word, recipe))
    first = found[0].recipe.model
    for other in found[1:]:
        model = replace(other.recipe.model, class_token=first.class_token)  # some have one beside the same patches
        if differing := differing_encoders(first, model):
            raise UserError(
                f"--methods: {found[0].name} and {other.name} train other encoders ({'; '.join(differing)})"
            )
    return found


def split(words: str, at: str) -> list[str]:
    """At each `at` that is not within brackets: a range is one value, and so are keys with theirs."""
    return re.split(rf"{at}(?![^\[]*\])(?![^{{]*\}})", words)


class Jury:
    """Scores what it is shown on the same labelled images."""

    def __init__(self, train: Source, test: Source | None, view: View, patch: int, device: torch.device) -> None:
        """Without a test set a fifth of the images is kept for it, which only their labels know."""
        order = epoch_order(0, "jury", 0, len(train))[np.arange(min(len(train), LABELLED + TESTED))]
        held = 0 if test else len(order) // 5
        self.train, self.test, self.device = train, test or train, device
        self.rows = order[held:][:LABELLED]
        self.unseen = (
            order[:held] if not test else epoch_order(0, "jury", 0, len(test))[np.arange(min(len(test), TESTED))]
        )
        self.tasks = class_tasks(train, self.test)
        self.view, self.patch = view, patch

    def encoder(self, name: str, encoder: Encoder, precision: TrainingPrecision) -> dict[str, dict[str, float]]:
        """Scores of its patches, and of its class token, where it has one, beside them."""
        half, encoder = pick_precision(precision, self.device), encoder.to(self.device)
        autocast = pick_autocast(half, self.device)
        looks: dict[str, Tokens] = {name: "patches"}
        if encoder.vit.config.class_token:
            looks[f"{name}, class token"] = "class"
        return {
            who: self.scores(EncoderFeatures(encoder, self.view, autocast, half, tokens=tokens))
            for who, tokens in looks.items()
        }

    def pixels(self) -> dict[str, float]:
        return self.scores(PixelFeatures(self.view, self.patch, self.device))

    def scores(self, extractor: Extractor) -> dict[str, float]:
        """k-NN and linear accuracy, means over tasks."""
        bank, queries = (
            extract(extractor, Images(source, rows, self.view))
            for source, rows in ((self.train, self.rows), (self.test, self.unseen))
        )
        found = [self.score(task, bank, queries) for task in self.tasks]
        return {name: mean(each[name] for each in found) for name in found[0]}

    def score(self, task: Task, bank: Tensor, queries: Tensor) -> dict[str, float]:
        labels, expected = task.labels[0][self.rows], task.labels[1][self.unseen]
        classes = len(task.classes)
        near = knn_predict(bank[:, -1], labels, queries[:, -1], classes, (K,), device=self.device)
        train, test = (Features(x.numpy(), np.arange(len(x))) for x in (bank, queries))
        probe = PROBE if bank.shape[1] > 1 else replace(PROBE, features=("last",))  # pixels have one layer
        linear = Probe(probe, train, labels, classes, self.device).run(test).predictions
        return {
            "knn": float((next(iter(near.values())) == expected).float().mean()),
            "linear": float((linear == expected).float().mean()),
        }


def compare(spec: str = "scenes:4000", test: str | None = None, methods: str = "ijepa,mae,ibot", budget: str = "30min",
            seeds: str = "0", looks: str = LOOKS, values: Mapping[str, str] | None = None, begun: Rows | None = None,
            keep: Callable[[Rows], None] = lambda rows: None) -> Rows:  # fmt: skip
    """Rows: a look at a contestant, with its seconds and steps of training; then the controls. Raises UserError.

    begun: rows that were kept before, whose contestants are not asked again. keep: gets all rows so far, after each contestant.
    A contestant that stops learning is left out, and said to be.
    """
    entered, limit = contestants(split(methods, ","), values or {}), seconds_of(budget)
    if not re.fullmatch(r"\d+(,\d+)*", seeds) or len(set(map(int, seeds.split(",")))) <= seeds.count(","):
        raise UserError(f"--seeds {seeds}: give whole numbers, each once, such as 0,1")
    if not looks.isdecimal() or not int(looks):
        raise UserError(f"--looks {looks}: give a whole number, 1 or more")
    first = entered[0].recipe
    device, size = pick_device(first.machine.device), first.model.image_size
    source = open_source(spec, size)
    refuse_late_mistakes(entered, len(source))
    jury = Jury(
        source,
        open_source(test, size) if test else None,
        View(size, first.model.channels),
        first.model.patch_size,
        device,
    )
    precision = pick_precision("auto", device)
    print(f"images of {size[0]}x{size[1]} pixels, patches of {first.model.patch_size}, an encoder {first.model.dim} wide and "
          f"{first.model.n_blocks} deep", file=sys.stderr)  # fmt: skip
    rows = list(begun or [])
    seen = {(row["who"], row["seed"]) for row in rows}
    for seed in map(int, seeds.split(",")):
        for contestant in entered:
            if (contestant.name, seed) in seen:
                continue
            own = contestant.recipe.precision
            recipe = replace(contestant.recipe, seed=seed, precision=precision if own == "auto" else own)
            try:
                seen_at = looked_at(contestant.name, recipe, spec, source, limit, jury, int(looks))
            except Diverged as error:
                print(f"{contestant.name}, seed {seed}, is left out: {str(error).partition(';')[0]}", file=sys.stderr)
                continue
            chance = jury.encoder(contestant.name, random_encoder(recipe), recipe.precision)
            rows += [*seen_at, *(control(f"{who}, random weights", seed, scores) for who, scores in chance.items())]
            keep(rows)
    if not rows:
        raise UserError("no contestant learned to its end")
    return [*rows, control("raw pixels", 0, jury.pixels())]


def kept_rows(files: Sequence[Path]) -> Rows:
    """Of comparisons that several files hold, as one. Raises UserError for two of the same contestant and seed."""
    whose: dict[tuple[str, int], Path] = {}
    rows: Rows = []
    for file in files:
        found = rows_of(file)
        for who in {(row["who"], row["seed"]) for row in found if row["step"]}:
            if who in whose:
                raise UserError(f"--kept: {whose[who]} and {file} both hold {who[0]}, seed {who[1]}")
            whose[who] = file
        rows += found
    return rows


def rows_of(file: Path) -> Rows:
    """Of the one comparison in a file, finished or not. Raises UserError."""
    try:
        found = [record["rows"] for name, record in json.loads(file.read_text()).items() if name.startswith("compare")]
        if any({"who", "seed", "step", "images", "seconds", *SCORES} - row.keys() for rows in found for row in rows):
            raise ValueError("its rows are none of a comparison")
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"--kept {file} holds no measurements: {first_line(error)}") from error
    if len(found) != 1:
        raise UserError(
            f"--kept {file} holds {len(found)} comparisons: give files of one each (bench compare --out FILE)"
        )
    if not found[0]:
        raise UserError(f"--kept {file} holds no row yet")
    rows: Rows = found[0]
    return rows


def refuse_late_mistakes(entered: Sequence[Contestant], images: int) -> None:
    """Raises UserError now for what would stop a contestant after the hours of those before it."""
    for recipe in (run for contestant in entered for run in runs(contestant.recipe)):
        steps_per_epoch(images, recipe.data.batch_size)
        share_of(recipe, 0, 1)
        with torch.device("meta"):
            METHODS[recipe.method].build(recipe)


def control(name: str, seed: int, scores: Mapping[str, float]) -> dict[str, object]:
    return {"who": name, "seed": seed, "step": 0, "images": 0, "seconds": 0.0, "images_per_s": 0.0, **scores}


def runs(recipe: Recipe) -> list[Recipe]:
    """What a contestant trains: one run, or the one that comes first and then the one that begins with it."""
    before = recipe.before()
    return [before, replace(recipe, first={})] if before else [recipe]


def looked_at(name: str, recipe: Recipe, spec: str, source: Source, limit: float, jury: Jury, looks: int) -> Rows:
    """Train one contestant for its time, then look at what it was on the way."""
    planned = [(run, steps_per_epoch(len(source), run.data.batch_size)) for run in runs(recipe)]
    speeds = [pace(run, spec, per_epoch, limit) for run, per_epoch in planned]
    own = [run.schedule.epochs * len(source) / speed for (run, _), speed in zip(planned, speeds, strict=True)]
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for k, ((run, per_epoch), speed, seconds) in enumerate(zip(planned, speeds, own, strict=True)):
            share = seconds / sum(own)  # of the time, as the recipe has it
            fit = limit * share * speed / run.data.batch_size  # steps
            shown = round(looks * share) if k < len(planned) - 1 else looks - len({row["step"] for row in rows})
            shown = max(1, min(shown, int(fit)))
            every = max(1, round(fit / shown))
            steps = every * shown
            print(f"{name}, seed {run.seed}: {run.method}, {speed:.0f} images/s, {steps} steps", file=sys.stderr)
            begun = replace(run, init_from=str(Path(folder) / f"{k - 1}")) if k else run
            rows += looks_at(
                name, stretched(begun, steps, per_epoch, every), spec, Path(folder) / f"{k}", jury, rows[-1:]
            )
    if not rows:
        raise Diverged("its last steps were not finite")
    took = rows[-1]["seconds"]
    if abs(took / limit - 1) > MOODY:
        print(f"note: {name} took {took:.3g} s, not {limit:.3g}: its pace at the start did not last", file=sys.stderr)
    return rows


def looks_at(name: str, recipe: Recipe, spec: str, run: Path, jury: Jury, last: Rows) -> Rows:
    """Train one run, and score its checkpoints. last: the row that it goes on from, if there is one."""
    pretrain(recipe, spec, run, Console(quiet=True))
    elapsed = {record["step"]: record["elapsed_s"] for record in read_metrics(run) if "elapsed_s" in record}
    done, images, seconds = (last[0][name] for name in ("step", "images", "seconds")) if last else (0, 0, 0.0)
    rows: Rows = []
    for found in checkpoints(run):
        if found.step not in elapsed:  # its last step was skipped
            continue
        row = {
            "seed": recipe.seed,
            "step": done + found.step,
            "images": images + found.step * recipe.data.batch_size,
            "seconds": seconds + elapsed[found.step],
        }
        row["images_per_s"] = row["images"] / row["seconds"]
        for who, scores in jury.encoder(name, load(found.path), recipe.precision).items():
            rows.append({"who": who, **row, **scores})
            found_out = ", ".join(f"{metric} {100 * value:.1f} %" for metric, value in scores.items())
            print(f"  {row['seconds']:.0f} s: {who}: {found_out}", file=sys.stderr)
    return rows

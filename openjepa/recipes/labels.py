"""How many labels pretraining saves: accuracy of an encoder against the number of labels, beside training from scratch."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from openjepa.engine.run import environment
from openjepa.engine.whole import make_folder, refuse_full, refuse_unwritable, taken, write_whole
from openjepa.errors import UserError, first_line
from openjepa.evaluate import suite
from openjepa.evaluate.features import array_hash
from openjepa.evaluate.finetune import FinetuneConfig
from openjepa.evaluate.labels import (
    FINETUNED,
    LEARNERS,
    PROBED,
    RECIPES,
    SCRATCH,
    Contest,
    LabelsConfig,
    draws,
    from_scratch,
    percent,
    worth,
)
from openjepa.evaluate.linear import LinearConfig
from openjepa.evaluate.subjects import Subject
from openjepa.recipes.finetuning import Finetuning, groups, laid, recipe_of
from openjepa.recipes.recipe import flat, from_dict

FILE, PICTURE = "labels.json", "labels.png"
VERSION = 1  # of the protocol: answers of another are not gone on with

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asked(Finetuning):
    """What `openjepa labels` is asked."""

    recipe: str = "small"
    labels: str = "1%,10%,100%"  # of each class
    draws: int = 3  # of each share below all
    min_steps: int = LabelsConfig.min_steps
    scratch_steps: int = LabelsConfig.scratch_steps
    rates: tuple[float, ...] = LabelsConfig.rates


def labels(asked: Asked, values: Mapping[str, str], console: Console) -> list[Record]:
    """Write OUT/labels.json and OUT/labels.png, print the table. Returns a record for each learner and share.

    values: --finetune.lr, --scratch.epochs, --linear.epochs and the like. What OUT holds of the same question is not computed
    again. Raises UserError.
    """
    shares = shares_in(asked.labels)
    if asked.draws < 1:
        raise UserError(f"--draws {asked.draws}: one at least")
    config = configured(asked, values)
    kept = read(asked.out)
    refuse_unwritable(asked.out)
    encoder, control, about, bench, task, contents = laid(asked, console)
    contest = Contest(
        config, Subject("pretrained", encoder, bench, console), Subject("random weights", control, bench, console), task,
        bench)  # fmt: skip
    question = json.loads(
        json.dumps(
            {
                "version": VERSION, "pretrained": contest.pretrained.extractor.identity,
                "random": contest.random.extractor.identity, "train": array_hash(contents[0]),
                "test": array_hash(contents[1]), "task": task.identity, "seed": asked.seed, "config": asdict(config),
            }
        )
    )  # fmt: skip
    refuse_other(asked.out, kept, question)
    rows = {share: draws(task, bench, share, asked.draws) for share in shares}
    make_folder(asked.out)
    with taken(asked.out, f"{asked.out} is being written by another process"):
        found = Kept(asked.out, question, read(asked.out))
        found.write()  # so that another question is refused from now on
        if found.records:
            console.print(f"going on after {len(found.records)} answers of {asked.out}", highlight=False)
        for share, several in rows.items():
            for draw, some in enumerate(several):
                for who in LEARNERS:
                    if (who, share, draw) not in found.records:
                        answer(contest, found, who, share, draw, some, len(several), console)
        return shown(asked, found, about["step"], task.name, console)


def answer(contest: Contest, found: Kept, who: str, share: float, draw: int, rows: np.ndarray, of: int,
           console: Console) -> None:  # fmt: skip
    """Let one learner learn, and keep what it is worth."""
    start = time.perf_counter()
    what = f"{who}, {len(rows):,} labels" + (f", draw {draw + 1} of {of}" if of > 1 else "")
    with console.status(what) as status:
        rate = 1.0 if who == PROBED else contest.config.rates[0]
        if who != PROBED and len(contest.config.rates) > 1:
            tried = found.rates.get((who, share))
            if tried is None:
                status.update(f"{what}: choosing a rate")
                tried = contest.choose(who, rows)
                found.add_rates(who, share, tried)
            rate = max(tried, key=lambda each: each[1])[0]
        scored = contest.ask(who, rows, rate, lambda line: status.update(f"{what}: {line}"))
    seconds = time.perf_counter() - start
    found.add({
        "of": who, "share": share, "draw": draw, "labels": len(rows), "metric": scored.metric, "value": scored.value,
        "interval": scored.interval, "per_class": scored.details["per_class"], "rate": rate,
        "seconds": round(seconds, 2)})  # fmt: skip
    console.print(f"{what}: {suite.shown(scored.value, scored.metric)} % after {seconds:.0f} s", highlight=False)


def shown(asked: Asked, found: Kept, step: int | None, task: str, console: Console) -> list[Record]:
    """The table, the picture, and how many labels were saved; of all that the folder holds an answer of each learner to."""
    from openjepa.see.figures import labels_figure

    means: list[Record] = []
    for share, several in found.whole().items():
        for who in LEARNERS:
            mine = [found.records[who, share, draw] for draw in several]
            values, count = [record["value"] for record in mine], mine[0]["labels"]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
            means.append({
                "task": task, "protocol": f"{count:,} ({percent(share)})", "of": who, "metric": "accuracy",
                "value": float(np.mean(values)), "spread": spread, "draws": len(values), "labels": count,
                "interval": mine[0]["interval"] if spread is None else None})  # fmt: skip
    at = f" at step {step}" if step is not None else ""
    console.print(suite.table(means, f"{asked.source}{at}, {asked.test}"))
    scratch = [(mean["labels"], mean["value"]) for mean in means if mean["of"] == SCRATCH]
    for mean in means:
        if mean["of"] == FINETUNED and len(scratch) > 1:
            console.print(f"fine-tuned on {mean['labels']:,} labels: as good as from scratch on {said(mean, scratch)}",
                          highlight=False)  # fmt: skip
    labels_figure(means).savefig(asked.out / PICTURE, dpi=150)
    console.print(f"written to {asked.out / FILE} and {asked.out / PICTURE}", highlight=False, soft_wrap=True)
    return means


def said(mean: Record, scratch: Sequence[tuple[int, float]]) -> str:
    """As many labels from scratch are worth, in words."""
    found = worth(mean["value"], scratch)
    if math.isinf(found):
        return f"more than {max(scratch)[0]:,}"
    return f"about {float(f'{found:.2g}'):,.0f}" if found else f"fewer than {min(scratch)[0]:,}"


def shares_in(text: str) -> list[float]:
    """1%,10% to [0.01, 0.1], each once, rising. Raises UserError."""
    found = set()
    for word in text.split(","):
        try:
            share = float(word.strip().removesuffix("%")) / 100
        except ValueError:
            share = 0.0
        if not word.strip().endswith("%") or not 0 < share <= 1:
            raise UserError(f"--labels {text}: give shares of the labels in percent, such as 1%,10%,100%")
        found.add(share)
    return sorted(found)


def rates_in(text: str) -> tuple[float, ...]:
    """0.3,1,3 to numbers. Raises UserError."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UserError(f"--rates {text}: give factors of the learning rates, such as 0.3,1,3") from error


def configured(asked: Asked, values: Mapping[str, str]) -> LabelsConfig:
    """The recipe with the values of the command line. Raises UserError."""
    trees = groups(values, "finetune", "scratch", "linear")
    tuned = from_dict(FinetuneConfig, trees["finetune"], "finetune", base=recipe_of(asked, RECIPES))
    scratch = from_dict(FinetuneConfig, trees["scratch"], "scratch", base=from_scratch(tuned))
    probe = from_dict(LinearConfig, trees["linear"], "linear", base=LinearConfig())
    steps = {"min_steps": asked.min_steps, "scratch_steps": asked.scratch_steps}
    return LabelsConfig(finetune=tuned, scratch=scratch, linear=probe, rates=asked.rates, **steps)


# ---------------------------------------------------------------- what a folder holds


class Kept:
    """The answers of a folder, by learner, share and draw; and the rates that were tried, by learner and share."""

    def __init__(self, folder: Path, question: Record, known: Record | None) -> None:
        self.file, self.question = folder / FILE, question
        known = known or {"results": [], "rates": []}
        self.records = {(r["of"], r["share"], r["draw"]): r for r in known["results"]}
        self.rates = {(r["of"], r["share"]): [(rate, value) for rate, value in r["tried"]] for r in known["rates"]}

    def whole(self) -> dict[float, list[int]]:
        """The draws of each share, rising, that every learner has answered."""
        answered = Counter((share, draw) for _, share, draw in self.records)
        found: dict[float, list[int]] = {}
        for share, draw in sorted(key for key, learners in answered.items() if learners == len(LEARNERS)):
            found.setdefault(share, []).append(draw)
        return found

    def add(self, record: Record) -> None:
        self.records[record["of"], record["share"], record["draw"]] = record
        self.write()

    def add_rates(self, who: str, share: float, tried: list[tuple[float, float]]) -> None:
        self.rates[who, share] = tried
        self.write()

    def write(self) -> None:
        rates = [{"of": who, "share": share, "tried": tried} for (who, share), tried in self.rates.items()]
        about = {"command": shlex.join(["openjepa", *sys.argv[1:]]), "environment": environment(),
                 "question": self.question, "rates": rates, "results": [*self.records.values()]}  # fmt: skip
        write_whole(self.file, json.dumps(about, indent=1) + "\n")


def read(out: Path) -> Record | None:
    """What a folder holds, or None where nothing is. Raises UserError for a damaged file, or a folder of something else."""
    file = out / FILE
    if not file.exists():
        if not out.is_dir() or {path.name for path in out.iterdir()} - {f"{FILE}.part"}:  # of one that was stopped
            refuse_full(out)
        return None
    try:
        found: Record = json.loads(file.read_text())
        _ = [found["question"]["config"], *((r["of"], r["share"], r["draw"], r["value"]) for r in found["results"])]
        _ = [(r["of"], r["share"], r["tried"][0][1]) for r in found["rates"]]
        return found
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): move it away") from error


def refuse_other(out: Path, known: Record | None, question: Record) -> None:
    """Raises UserError if a folder holds answers to another question, and says what differs."""
    if known is None or known["question"] == question:
        return
    there, here = flat(known["question"]), flat(question)
    key = next(name for name in [*here, *there] if here.get(name) != there.get(name))
    if key.endswith("weights"):
        raise UserError(f"{out} holds the answers of another encoder: choose another --out")
    if key in ("train", "test", "task"):
        raise UserError(f"{out} holds the answers to other images or labels ({key}): choose another --out")
    key, before, now = key.removeprefix("config."), there.get(key), here.get(key)
    raise UserError(f"{out} holds answers with {key} {before}, and it is {now} now: choose another --out")

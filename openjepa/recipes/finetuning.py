"""Fine-tune a run's encoder on labels, score it once, and keep what came of it as a classifier."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from openjepa.convert import native
from openjepa.engine.device import Precision, pick_device, pick_precision
from openjepa.engine.whole import new_folder, refuse_full, refuse_unwritable
from openjepa.errors import UserError, nearest
from openjepa.evaluate import answers, suite
from openjepa.evaluate import finetune as method
from openjepa.evaluate.features import Images, contents
from openjepa.evaluate.scores import accuracy
from openjepa.evaluate.subjects import Bench, Task, tasks
from openjepa.models.encoder import Encoder
from openjepa.recipes import evaluation
from openjepa.recipes.evaluation import Part, Question
from openjepa.recipes.recipe import from_dict, nested
from openjepa.recipes.suites import Found

FILE = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What `openjepa finetune` is asked."""

    source: str
    train: str
    test: str
    out: Path
    recipe: str = "low_shot"
    task: str | None = None  # one of the sets of labels; needed where there are several
    network: str | None = None
    share: float | None = None
    squash: bool = False
    precision: Precision | None = None
    device: str = "auto"
    seed: int = 0
    workers: int | None = None  # processes that load images; None: beside a GPU up to 8


class Laid(NamedTuple):
    """What a fine-tuning starts from. control: the same network with random weights. contents: hashes of the images of
    both sets."""

    encoder: Encoder
    control: Encoder
    about: dict[str, Any]
    bench: Bench
    task: Task
    contents: tuple[np.ndarray, np.ndarray]


def finetune(asked: Finetuning, values: Mapping[str, str], console: Console) -> float:
    """Write OUT/classifier.safetensors, which `load` reads, and OUT/evaluation.json. Returns the test accuracy.

    values: --finetune.epochs and the like. Raises UserError; `out` is then not made.
    """
    trees = groups(values, "finetune")
    base = recipe_of(asked, method.RECIPES)
    refuse_full(asked.out)
    refuse_unwritable(asked.out)
    config = from_dict(method.FinetuneConfig, trees["finetune"], "finetune", base=base)
    encoder, _, about, bench, task, _ = laid(asked, console)
    labels, expected = task.labels
    start = time.perf_counter()
    encoder.to(bench.device)
    model = method.finetune(
        config, encoder, bench.train, np.arange(len(bench.train)), labels, len(task.classes), bench.view, bench.autocast,
        asked.seed, bench.workers, lambda line: console.print(line, highlight=False))  # fmt: skip
    images = Images(bench.test, np.arange(len(bench.test)), bench.view)
    answer = accuracy(
        method.classify(model, encoder, images, bench.autocast, bench.workers), expected, len(task.classes)
    )
    record = {
        "train": asked.train, "test": asked.test, "network": encoder.network, "step": about["step"], "task": task.name,
        "protocol": f"finetune:{asked.recipe}", "of": "pretrained", "view": asdict(bench.view), "classes": task.classes,
        "config": asdict(config), "seconds": round(time.perf_counter() - start, 2),
        "command": shlex.join(["openjepa", *sys.argv[1:]]), **asdict(answer)}  # fmt: skip
    classifier = Encoder(model.vit.cpu(), encoder.normalise.cpu(), "finetuned", model.head.cpu(), task.classes)
    with new_folder(asked.out) as folder:
        native.write(folder / FILE, classifier)
        answers.write(folder, [record], {})
    console.print(suite.table([record], f"{asked.source} fine-tuned on {asked.train}"))
    console.print(f'load: openjepa.load("{asked.out}").classify(images)', highlight=False, soft_wrap=True)
    return answer.value


def groups(values: Mapping[str, str], *names: str) -> dict[str, Any]:
    """{"finetune.lr": "1e-4"} to {"finetune": {"lr": 1e-4}}, a tree for each name. Raises UserError for others."""
    for path in values:
        if path.partition(".")[0] not in names or "." not in path:
            known = ", ".join(f"--{name}.…" for name in names)
            raise UserError(f"unknown option --{path}: values of the recipe are {known} such as --finetune.lr 1e-4")
    return {**{name: {} for name in names}, **nested(values)}


def recipe_of(asked: Finetuning, known: Mapping[str, method.FinetuneConfig]) -> method.FinetuneConfig:
    """By its name. Raises UserError."""
    if asked.recipe not in known:
        raise UserError(f"unknown recipe '{asked.recipe}': one of {', '.join(known)}{nearest(asked.recipe, known)}")
    return known[asked.recipe]


def laid(asked: Finetuning, console: Console) -> Laid:
    """The encoder, the images, and the one set of labels that is asked about. Raises UserError."""
    encoder, control, about = evaluation.subjects(Question(source=asked.source, network=asked.network, seed=asked.seed))
    device = pick_device(asked.device)
    precision = pick_precision(asked.precision or about["precision"], device)
    question = Question(
        source=asked.source, share=asked.share, squash=asked.squash, seed=asked.seed, workers=asked.workers
    )
    data = Found("the sets given", asked.train, asked.test, 1.0)
    bench = evaluation.laid(question, Part(data, ()), encoder, encoder.vit.config.image_size, device, precision)
    found = tasks(bench.train, bench.test, "class", [asked.task] if asked.task else None)
    if len(found) != 1:
        raise UserError(f"which labels? --task, one of {', '.join(task.name for task in found)}")
    held = np.array(contents(bench.train)), np.array(contents(bench.test))
    if shared := int(np.isin(held[1], held[0]).sum()):
        console.print(suite.in_both(shared), style="yellow", highlight=False)
    return Laid(encoder, control, about, bench, found[0], held)

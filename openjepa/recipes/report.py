"""Draw a run: the pictures of see/ on the run's own data, into RUN/report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openjepa.data.sources import Source, open_source
from openjepa.engine.run import read_metrics
from openjepa.evaluate import answers, suite
from openjepa.evaluate.features import Images, View
from openjepa.recipes.exchange import load
from openjepa.recipes.methods import METHODS
from openjepa.recipes.pretrain import random_encoder, saved_data, saved_recipe
from openjepa.recipes.recipe import to_yaml
from openjepa.rng import permutation
from openjepa.see import figures, pictures
from openjepa.see.report import Section, code, html_table, write_report

SHOWN = 8  # images in a row
SEARCHED = 1500  # images that neighbours are looked for in


def report(run: Path) -> Path:
    """Write RUN/report.html from what the run's folder and its data hold. Returns its path."""
    recipe, data = saved_recipe(run), saved_data(run)
    encoder, control = load(run), random_encoder(recipe)
    source = open_source(data["data"], recipe.model.image_size)
    images = some_images(source, recipe.model.image_size, recipe.model.channels, recipe.seed)
    metrics, known = read_metrics(run), answers.read(run)
    sections = [section for records in together(known) for section in worth(records)]
    family = METHODS[recipe.method]
    masks = family.views(recipe).masks(recipe.seed, 0, np.arange(SHOWN), np.arange(SHOWN))
    drawn = pictures.masks_figure(images[:SHOWN], masks, recipe.model.grid)
    sections.append(Section("What it had to predict", family.kind.task, drawn))
    if metrics:
        text = (
            "The loss alone says little: features that stop telling images apart also make it fall. "
            "Spread and rank must stay away from zero."
        )
        sections.append(Section("How training went", text, figures.curves_figure(metrics)))
    sections += [
        Section(
            "What patches look alike",
            "The three principal directions of the patch features as red, green and blue, the same for all images.",
            pictures.pca_figure([("pretrained", encoder), ("random weights", control)], images[:SHOWN]),
        ),
        Section(
            "What images look alike",
            f"Nearest neighbours by cosine of pooled features, among {len(images)} images.",
            pictures.neighbours_figure(encoder, images),
        ),
        Section(
            "How to make it again", "", body=code("recipe.yaml", to_yaml(recipe)) + code("data.json", pretty(data))
        ),
    ]
    last = metrics[-1]["step"] if metrics else 0
    lead = f"{data['images']} images from {data['data']}, {last} steps of {recipe.data.batch_size}, seed {recipe.seed}"
    path = run / "report.html"
    write_report(path, f"openjepa: {run.resolve().name}", lead, sections)
    return path


def together(known: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The newest answers, a list for each pair of sets, network and view."""
    newest = {pretty([r.get("changed"), *(r[name] for name in answers.PLACE)]): r for r in known}
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in newest.values():
        groups.setdefault(pretty([record[name] for name in ("train", "test", "network", "view")]), []).append(record)
    return list(groups.values())


def worth(records: list[dict[str, Any]]) -> list[Section]:
    """The scores on one test set, and who is taken for whom."""
    one = records[0]
    height, width = one["view"]["size"]
    text = (
        f"The pretrained {one['network'].replace('_', ' ')}, the same network with random weights, and raw pixels, on "
        f"{one['test']}, seen at {height}x{width} pixels. The bars' ends and the ± are 95 % intervals over the test images, sd "
        "is the deviation over draws."
    )
    subjects, rows = suite.rows(records)
    table = html_table(["task", "protocol", "metric"], subjects, rows)
    sections = [Section("What it is worth", text, figures.scores_figure(records), table)]
    shown = [r for r in records if r["of"] == "pretrained" and "confusion" in r["details"]]
    if shown:
        protocol = "linear" if any(r["protocol"] == "linear" for r in shown) else shown[0]["protocol"]
        chosen = [r for r in shown if r["protocol"] == protocol]
        text = f"Each class by its own score, {protocol}."
        sections.append(Section("Which classes it knows", text, figures.classes_figure(chosen)))
        text = f"Of the images of each class, the share that {protocol} takes for each other."
        sections.append(Section("What it confuses", text, figures.confusion_figure(chosen)))
    return sections


def some_images(source: Source, size: tuple[int, int], channels: int, seed: int) -> Tensor:
    """A fixed random choice of images, uint8 [n, C, H, W]."""
    chosen = permutation(seed, "report", 0, len(source))[:SEARCHED]
    images = Images(source, chosen, View(size, channels), skip_bad=True)
    return torch.stack([images[i] for i in range(len(images))])


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1)

"""The whole of openjepa in minutes: pretrain on the embedded scenes, evaluate, draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from openjepa.recipes.evaluation import Question, evaluate
from openjepa.recipes.ijepa import ijepa_scenes
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.report import report

TRAIN = "scenes:8000"  # without labels
LABELLED, TEST = "scenes:500", "scenes:8000-12000"  # labels are scarce: that is why anyone pretrains


def demo(out: Path, seed: int, console: Console) -> None:
    """Pretrain, evaluate the four tasks against both controls, write OUT/report.html."""
    recipe = replace(ijepa_scenes(), seed=seed)
    console.print(f"pretraining on {TRAIN}: rendered scenes of 3 to 10 objects; nothing is downloaded", highlight=False)
    pretrain(recipe, TRAIN, out, console)
    evaluate(Question(source=str(out), train=LABELLED, test=TEST, seed=seed), {}, console)
    page = report(out)
    console.print(
        f"pictures: {page}\nnext: openjepa pretrain --recipe ijepa_auto --data YOUR_IMAGES --out runs/mine",
        highlight=False,
        soft_wrap=True,
    )

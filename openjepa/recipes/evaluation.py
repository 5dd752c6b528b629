"""Evaluate a run: its encoder beside random weights and raw pixels, into RUN/evaluation.json."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from openjepa.data.sources import open_source
from openjepa.engine.checkpoint import locate
from openjepa.engine.run import environment
from openjepa.evaluate import suite
from openjepa.recipes.exchange import load
from openjepa.recipes.pretrain import random_encoder, saved_recipe


def evaluate_run(run: Path, train: str, test: str, protocols: Sequence[str], network: str, device: str,
                 console: Console) -> None:  # fmt: skip
    """Score a run's newest checkpoint, or one checkpoint folder; print the table, write evaluation.json there.

    Raises UserError.
    """
    start = time.perf_counter()
    folder, checkpoint = locate(run)
    recipe = saved_recipe(folder)
    encoders = {"pretrained": load(run, network), "random weights": random_encoder(recipe)}
    sources = open_source(train, recipe.model.image_size), open_source(test, recipe.model.image_size)
    results = suite.evaluate(encoders, *sources, protocols, device, recipe.precision, console)
    seconds = time.perf_counter() - start
    suite.write(
        run,
        results,
        {
            "command": " ".join(["openjepa", *sys.argv[1:]]),
            "network": network,
            "step": checkpoint.step,
            "train": {"data": train, "images": len(sources[0])},
            "test": {"data": test, "images": len(sources[1])},
            "seconds": round(seconds, 1),
            "environment": environment(),
        },
    )
    console.print(suite.table(results, f"{network} of {run} at step {checkpoint.step}, {test}"))
    console.print(f"written to {run / 'evaluation.json'} after {seconds:.0f} s", highlight=False)

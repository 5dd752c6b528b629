"""A recipe, images and a folder become a trained encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from openjepa.data.order import epoch_order
from openjepa.data.sources import Source, open_source
from openjepa.data.store import limit, limited
from openjepa.data.stream import Batch, Steps, batches, share, steps_per_epoch
from openjepa.engine import checkpoint, parallel
from openjepa.engine.device import pick_autocast, pick_device, pick_precision, pick_workers
from openjepa.engine.fp8 import use_fp8
from openjepa.engine.launch import Roll, joined
from openjepa.engine.monitors import Watch
from openjepa.engine.optim import Schedule, build_optimizer
from openjepa.engine.run import Run, alone
from openjepa.engine.train import train
from openjepa.engine.whole import make_folder, refuse_unwritable, write_whole
from openjepa.errors import UserError, first_line
from openjepa.evaluate.features import EncoderFeatures, Images, View, extract
from openjepa.evaluate.knn import knn_predict
from openjepa.methods.method import Method
from openjepa.models.encoder import Encoder, Normalise
from openjepa.models.vit import ViT
from openjepa.recipes.methods import METHODS, inputs, refuse_many_pixels
from openjepa.recipes.recipe import Recipe, differences, from_dict, from_yaml, to_yaml
from openjepa.recipes.replay import dump
from openjepa.rng import key

FIRST = "first"  # the run that comes first, inside of the one that begins with it
BEGINNINGS = ("data.json", "data.json.part", "recipe.yaml.part", "slurm")  # what a start that was killed leaves


def pretrain(recipe: Recipe, data: str, out: str | Path, console: Console | None = None) -> Method:
    """Pretrain, or go on with what `out` holds; together with the processes that were launched beside this one.

    console: where progress is printed. Raises UserError for another recipe or other data in `out`, and Interrupted after a
    signal.
    """
    out, console = Path(out), console or Console()
    with joined() as roll, limited(recipe.machine.read_mb_s):
        if recipe.first and not checkpoint.checkpoints(out):
            check(recipe, data, out, parallel.world_size())  # both, before anything is written
            recipe = settled(recipe, out, pick_device(recipe.machine.device))
            before = recipe.before()
            assert before is not None
            if parallel.rank() == 0:  # so that whoever goes on with it is told what it was to be
                prepare(out, recipe, data, open_source(data, recipe.model.image_size))
            pretrain_together(before, data, out / FIRST, console, roll)
        return pretrain_together(recipe, data, out, console, roll)


def pretrain_together(recipe: Recipe, data: str, out: Path, console: Console, roll: Roll | None) -> Method:
    if parallel.rank() > 0:
        console = Console(quiet=True)
    if roll:
        roll.patience = recipe.machine.patience_s
    device = pick_device(recipe.machine.device)
    recipe = settled(recipe, out, device)
    mine = share_of(recipe, parallel.rank(), parallel.world_size())
    source, schedule = opened(recipe, data, out)
    method = build(recipe)
    said = "" if checkpoint.checkpoints(out) else begin(method, recipe, out)
    method.to(device)
    if recipe.precision == "fp8":
        console.print(use_fp8(method, device), highlight=False)
    method.recompute_blocks(recipe.machine.recompute)
    if recipe.machine.compile:
        method.compile_blocks()
    if parallel.rank() == 0:
        prepare(out, recipe, data, source)
    parallel.barrier()
    stranger = None if (out / "recipe.yaml").exists() else parallel.rank()
    if strangers := [rank for rank in parallel.gather(stranger) if rank is not None]:
        raise UserError(
            f"{out} is not the same folder for all processes (rank {strangers[0]} sees another): use a disk that they share"
        )
    method.share(parallel.rank(), parallel.world_size())
    model = parallel.spread(method, recipe.machine.strategy, device, recipe.precision != "fp32")
    optimizer = build_optimizer(method, recipe.optim)
    run = Run(out, recipe.machine.keep, console, round(recipe.machine.keep_every * schedule.steps_per_epoch))
    if run.resumed:
        checkpoint.restore(run.resumed, method, optimizer)
        console.print(f"going on from step {run.step} of {schedule.steps} in {out}", highlight=False)
    elif said:
        console.print(said, highlight=False)
    if run.step >= schedule.steps:
        return method
    steps = Steps(source, recipe.data, METHODS[recipe.method].views(recipe), recipe.seed, mine)
    normalise = Normalise(recipe.data.mean, recipe.data.std).to(device)
    autocast = pick_autocast(recipe.precision, device)

    def forward(batch: Batch) -> dict[str, Tensor]:
        out: dict[str, Tensor] = model(*inputs(batch, normalise))
        return out

    @torch.no_grad()
    def features(batch: Batch) -> Tensor:
        images = batch.images if batch.images.ndim == 4 else batch.images[:, 0]
        with autocast():
            return method.product(normalise(images))

    workers = pick_workers(recipe.machine.workers, device)
    read_mb_s = recipe.machine.read_mb_s and recipe.machine.read_mb_s / (workers + 1)  # this process reads, too
    limit(read_mb_s)
    with run:
        run.open_boards(recipe.machine.wandb)
        watched = features if method.represents else None
        knn = online_knn(source, recipe, method.product, normalise, autocast) if watched else None
        watch = Watch(
            run,
            recipe.monitors,
            schedule,
            method,
            recipe.data,
            len(source),
            device,
            watched,
            knn,
            name=source.name,
            dump=lambda done, batch: str(
                dump(out, recipe, done, done / schedule.steps_per_epoch, batch, source.name, method, optimizer)
            ),
            roll=roll,
        )
        train(
            method,
            batches(steps, run.step, schedule.steps, workers, pin=device.type == "cuda", read_mb_s=read_mb_s),
            optimizer,
            schedule,
            run,
            watch,
            forward=forward,
            accumulating=partial(parallel.accumulating, model),
            autocast=autocast,
            save_every=max(1, round(recipe.machine.checkpoint_every * schedule.steps_per_epoch)),
            seed=recipe.seed,
        )
    return method


def share_of(recipe: Recipe, rank: int, ranks: int) -> np.ndarray:
    """The slots of a step that one rank makes. Raises UserError for what does not divide, or more crops than it could hold."""
    mine = share(recipe.data.batch_size, recipe.optim.accumulate, rank, ranks)
    refuse_many_pixels(recipe, len(mine) // recipe.optim.accumulate)
    return mine


def opened(recipe: Recipe, data: str, out: Path) -> tuple[Source, Schedule]:
    """The images of a run, and its schedule. Raises UserError for what cannot be trained. Writes nothing."""
    source = open_source(data, recipe.model.image_size)
    schedule = Schedule(recipe.optim, recipe.schedule, steps_per_epoch(len(source), recipe.data.batch_size))
    if (kept := checkpoint.checkpoints(out)) and kept[-1].step > schedule.steps:
        raise UserError(
            f"{out} is at step {kept[-1].step}, and the recipe's {recipe.schedule.epochs:g} epochs end at {schedule.steps}: "
            "raise schedule.epochs"
        )
    return source, schedule


def settled(recipe: Recipe, out: Path, device: torch.device) -> Recipe:
    """`precision: auto` is settled once, when a run begins, so that it goes on in the same arithmetic everywhere."""
    if recipe.precision != "auto":
        return recipe
    saved = saved_recipe(out).precision if (out / "recipe.yaml").exists() else "auto"  # auto: imported, not begun
    return replace(recipe, precision=pick_precision(saved, device))


def build(recipe: Recipe) -> Method:
    """The method with its initial weights, a function of the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(recipe.seed, "weights") % 2**63)
        return METHODS[recipe.method].build(recipe)


def begin(method: Method, recipe: Recipe, out: Path) -> str:
    """Begin with the weights that a new run begins with, where it is not chance. Returns what to tell. Raises UserError."""
    from openjepa.recipes.beginning import begin_with  # which loads runs, and so knows this module

    source = str(out / FIRST) if recipe.first else recipe.init_from
    return begin_with(method, recipe, source) if source else ""


def prepare(out: Path, recipe: Recipe, data: str, source: Source) -> None:
    """Make the run's folder, or see that it was made by the same recipe from the same images. Raises UserError."""
    if (out / "recipe.yaml").exists():
        os.close(alone(out))  # refused before anything is written
    about = fitting(out, recipe, data, source)
    try:
        make_folder(out)
        write_whole(out / "data.json", json.dumps(about, indent=1) + "\n")
        write_whole(out / "recipe.yaml", to_yaml(recipe))  # last: with it a folder is a run
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error


def fitting(out: Path, recipe: Recipe, data: str, source: Source) -> dict[str, Any]:
    """What data.json says of these images. Raises UserError where `out` was made by another recipe or from others."""
    about = {"data": data, "images": len(source), "fingerprint": source.fingerprint()}
    if (out / "recipe.yaml").exists():
        its = saved_recipe(out)
        if not (out / "data.json").exists():  # imported, no step taken yet: its networks alone are given
            its = replace(recipe, model=its.model, predictor=its.predictor)
        elif its.precision == "auto":  # and stopped before it was settled
            its = replace(its, precision=recipe.precision)
        if changed := differences(its, recipe):
            raise UserError(f"{out} was made with another recipe ({'; '.join(changed)}): choose another --out")
        saved = saved_data(out) if (out / "data.json").exists() else about
        if {**saved, "data": ""} != {**about, "data": ""}:
            raise UserError(
                f"{out} was made from other images ({saved['data']}, {saved['images']} images): now {data} has {len(source)} "
                "images and other contents; choose another --out"
            )
    else:
        refuse_stranger(out)
    return about


def refuse_stranger(out: Path) -> None:
    """Raises UserError for a folder in which no run can begin."""
    if out.exists() and (not out.is_dir() or any(f.name not in BEGINNINGS for f in out.iterdir())):
        raise UserError(f"{out} exists and is not a run: choose an empty or new folder for --out")


def check(recipe: Recipe, data: str, out: Path, processes: int) -> None:
    """What `pretrain` on so many processes would refuse at its start. Raises UserError. Writes nothing."""
    share_of(recipe, 0, processes)
    source, _ = opened(recipe, data, out)
    fitting(out, settled(recipe, out, torch.device("cpu")), data, source)
    refuse_unwritable(out)
    if checkpoint.checkpoints(out):
        return
    if recipe.init_from:
        begin(build(recipe), recipe, out)
    if before := recipe.before():
        try:
            check(before, data, out / FIRST, processes)
        except UserError as error:
            raise UserError(f"first: {error}") from error


def saved_recipe(run: Path) -> Recipe:
    """The recipe of a run. Raises UserError if there is none."""
    try:
        return from_dict(Recipe, from_yaml((run / "recipe.yaml").read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{run} is not a run: it has no recipe.yaml") from error
    except ValueError as error:
        raise UserError(f"{run / 'recipe.yaml'} is not YAML: {error}") from error


def saved_data(run: Path) -> dict[str, Any]:
    """What a run was trained on. Raises UserError for an imported run that has not trained here."""
    if not (run / "data.json").exists():
        raise UserError(f"{run} has seen no images yet: openjepa pretrain --out {run} --data SPEC")
    try:
        found = json.loads((run / "data.json").read_text())
        return {name: found[name] for name in ("data", "images", "fingerprint")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run / 'data.json'} is damaged ({first_line(error)}): give the images again, --data SPEC"
        ) from error


def own_images(run: Path, size: tuple[int, int]) -> Source:
    """The images that a run was trained on. Raises UserError where they are gone, or others are in their place."""
    data = saved_data(run)
    source = open_source(data["data"], size)
    if source.fingerprint() != data["fingerprint"]:
        raise UserError(f"{data['data']} holds other images now than those that {run} was trained on")
    return source


def random_encoder(recipe: Recipe) -> Encoder:
    """The control: the same network with the random weights that all began with, those of the first run where there is one."""
    vit = build(recipe.before() or recipe).product
    return Encoder(vit.eval(), Normalise(recipe.data.mean, recipe.data.std), "random weights").eval()


def online_knn(
    source: Source, recipe: Recipe, encoder: ViT, normalise: Normalise, autocast: Callable[..., Any]
) -> Callable[[], dict[str, float]] | None:
    """Accuracy of 20 nearest neighbours for each task, each fifth of some training images among the others; None where there are
    no labels, or no other image."""
    tasks = [task for task, classes in source.classes.items() if len(classes) > 1]
    if not tasks or not recipe.monitors.knn_every or len(source) < 2:
        return None
    chosen = epoch_order(recipe.seed, "online knn", 0, len(source))[
        np.arange(min(recipe.monitors.knn_images, len(source)))
    ]
    view = View(recipe.model.image_size, recipe.model.channels)
    ranks = parallel.world_size()
    mine = np.resize(chosen, -(-len(chosen) // ranks) * ranks)[parallel.rank() :: ranks]
    images = Images(source, mine, view, skip_bad=True)
    extractor = EncoderFeatures(Encoder(encoder, normalise, "online").eval(), view, autocast, "", layers=1)

    def knn() -> dict[str, float]:
        features = parallel.interleaved(extract(extractor, images)[:, -1])[: len(chosen)]
        scores = {}
        for task in tasks:
            labels = torch.from_numpy(source.labels[task][chosen])
            classes = len(source.classes[task])
            right = torch.zeros(len(labels))
            for fifth in range(5):
                asked = torch.arange(len(labels)) % 5 == fifth
                [predicted] = knn_predict(features[~asked], labels[~asked], features[asked], classes, ks=(20,)).values()
                right[asked] = (predicted == labels[asked]).float()
            scores["knn_accuracy" if task == "label" else f"knn_accuracy_{task}"] = float(right.mean())
        return scores

    return knn

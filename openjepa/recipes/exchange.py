"""Weights in and out: load an encoder, import a checkpoint as a run, export a run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from openjepa.convert import formats, released
from openjepa.convert.names import Imported, Told
from openjepa.engine import checkpoint
from openjepa.engine.checkpoint import Checkpoint
from openjepa.engine.optim import Schedule, build_optimizer
from openjepa.engine.run import environment, read_metrics, write_whole
from openjepa.errors import UserError, nearest
from openjepa.models.encoder import Encoder, Normalise
from openjepa.models.vit import ViT
from openjepa.models.weights import load_strict
from openjepa.recipes.pretrain import build, saved_data, saved_recipe
from openjepa.recipes.recipe import Recipe, differences, to_yaml

NETWORKS = ("target_encoder", "encoder", "predictor")


def load(source: str | Path, network: str = "target_encoder") -> Encoder:
    """An encoder on the CPU, ready for inference.

    source: a run (its newest checkpoint), one of its checkpoint folders, an exported file or folder, a released
    checkpoint, a Hugging Face or timm folder, or hf:NAME. network: target_encoder (what every evaluation uses) or
    encoder (the context encoder). Raises UserError.
    """
    if network not in ("target_encoder", "encoder"):
        raise UserError(f"network '{network}': one of target_encoder, encoder")
    if is_run(Path(source)):
        folder, found = checkpoint.locate(Path(source))
        recipe = saved_recipe(folder)
        weights = network_weights(found, network)
        return ready(ViT(recipe.model), weights, recipe.data.mean, recipe.data.std, network, str(found.path))
    imported = formats.read(str(source), Told())
    if network not in imported.weights:
        raise UserError(f"{source} holds no '{network}', only {', '.join(imported.weights)}")
    return ready(ViT(imported.model), imported.weights[network], imported.mean, imported.std, network, str(source))


def is_run(path: Path) -> bool:
    """Whether a path is a run, one of its checkpoints, or a mistaken attempt at either rather than an exported file."""
    return (path / "recipe.yaml").exists() or path.parent.name == "checkpoints"


def ready(
    vit: ViT,
    weights: dict[str, Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    network: str,
    where: str,
) -> Encoder:
    load_strict(vit, weights, where)
    return Encoder(vit.eval().requires_grad_(False), Normalise(mean, std), network).eval()


def network_weights(found: Checkpoint, network: str) -> dict[str, Tensor]:
    """One network of a checkpoint, under its own names."""
    return {k.removeprefix(f"{network}."): v for k, v in found.weights().items() if k.startswith(f"{network}.")}


# ---------------------------------------------------------------- import


def import_weights(source: str, out: Path, base: Recipe, told: Told, given: bool) -> tuple[Recipe, int, list[str]]:
    """Make a run of any readable weights, at the step they were saved at.

    base: the recipe to go on with; given: whether the user chose it, so that its model must be the weights' own. Returns
    the run's recipe, its step and what a reader should know. Raises UserError; `out` is then not made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another --out")
    imported = formats.read(source, told)
    recipe = with_architecture(base, imported, given, source)
    method = build(recipe)
    notes = []
    for network in NETWORKS:
        if network in imported.weights:
            load_strict(getattr(method, network), imported.weights[network], f"{source}'s {network}")
    if "encoder" not in imported.weights:
        method.encoder.load_state_dict(imported.weights["target_encoder"])
        notes.append("an encoder alone: the context encoder starts as its copy, the predictor at random")
    optimizer = build_optimizer(method, recipe.optim)
    if imported.optimizer:
        for name, parameter in checkpoint.learning(method):
            entries = {k.rpartition("/")[2]: v for k, v in imported.optimizer.items() if k.startswith(f"{name}/")}
            optimizer.state[parameter] = dict(entries)
    elif "encoder" in imported.weights:
        notes.append("no optimiser state: training would begin at step 0 from these weights")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        state = {"bad_images": {}, "environment": environment(), "imported": source}
        checkpoint.save(part, imported.step, method, optimizer, state, keep=1)
        write_whole(part / "recipe.yaml", to_yaml(recipe))
        if out.exists():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return recipe, imported.step, notes


def with_architecture(base: Recipe, imported: Imported, given: bool, source: str) -> Recipe:
    """The recipe with the networks that the weights belong to."""
    predictor = imported.predictor or base.predictor
    if given:
        if imported.predictor and base.predictor.heads == base.model.n_heads:
            predictor = replace(predictor, heads=base.predictor.heads)  # said, not left to the encoder
        own = replace(base, model=imported.model, predictor=predictor)
        if changed := differences(own, base):
            raise UserError(f"{source} is not of this recipe ({'; '.join(changed)})")
        return base
    data = replace(
        base.data, mean=imported.mean, std=imported.std, batch_size=imported.batch_size or base.data.batch_size
    )
    return replace(base, model=imported.model, predictor=predictor, data=data)


# ---------------------------------------------------------------- export


def export(
    source: str, form: str, out: Path, network: str = "target_encoder", image_size: tuple[int, int] | None = None
) -> str:
    """Write one network of a run (or of anything that `load` takes) in another format, into an empty or new folder.

    form: hf, timm, onnx, safetensors, or released (all three networks and the optimiser). image_size: height and width in
    pixels, where other than the run's; the positions are interpolated once and stored. Returns the line of Python that
    loads it. Raises UserError; `out` is then not made.
    """
    if form not in formats.FORMATS:
        raise UserError(f"unknown format '{form}': one of {', '.join(formats.FORMATS)}{nearest(form, formats.FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another --out")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        line = write(source, form, part, network, image_size)
        if out.exists():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return line.replace(str(part), str(out))


def write(source: str, form: str, folder: Path, network: str, image_size: tuple[int, int] | None) -> str:
    """Into an existing empty folder."""
    if image_size and (network == "predictor" or form not in ("hf", "timm", "onnx")):
        raise UserError(
            f"{form} stores no positions, so that --image-size has no place in it: openjepa.load takes images of any size"
        )
    if form == "released":
        return write_released(Path(source), folder / "checkpoint.pth.tar")
    if network == "predictor":
        return write_predictor(source, form, folder)
    encoder = load(source, network)
    return formats.WRITERS[form](folder, encoder.resized(image_size) if image_size else encoder)


def write_predictor(source: str, form: str, folder: Path) -> str:
    """The predictor has a format of its own nowhere; as plain tensors it can leave."""
    if form != "safetensors":
        raise UserError(f"{form} carries encoders: the predictor can be exported as safetensors or released")
    from safetensors.torch import save_file

    run, found = checkpoint.locate(Path(source))
    recipe = saved_recipe(run)
    about = {"predictor": vars(recipe.predictor), "grid": recipe.model.grid, "encoder_width": recipe.model.dim}
    file = folder / "predictor.safetensors"
    save_file(network_weights(found, "predictor"), file, {"openjepa predictor": json.dumps(about)})
    return f"safetensors.torch.load_file('{file}')"


def write_released(source: Path, file: Path) -> str:
    """All three networks, optimiser and position of a run, as the published code saves them."""
    run, found = checkpoint.locate(source)
    recipe = saved_recipe(run)
    per_epoch = steps_per_epoch(run, recipe)
    schedule = Schedule(recipe.optim, recipe.schedule, per_epoch)
    last = max(0, found.step - 1)
    losses = [record["loss"] for record in read_metrics(run) if record["step"] <= found.step and "loss" in record]
    about: dict[str, Any] = {
        "epoch": found.step // per_epoch,
        "loss": losses[-1] if losses else float("nan"),
        "batch_size": recipe.data.batch_size,
        "world_size": 1,
        "lr": schedule.lr(last),
        "weight_decay": schedule.weight_decay(last),
    }
    weights = {network: network_weights(found, network) for network in NETWORKS}
    if recipe.predictor.heads not in (None, recipe.model.n_heads):
        raise UserError("the released layout gives the predictor the encoder's heads, and predictor.heads differs")
    released.write(file, recipe.model, recipe.predictor, weights, found.optimizer(), about)
    return f"torch.load('{file}', weights_only=True)['target_encoder']"


def steps_per_epoch(run: Path, recipe: Recipe) -> int:
    """Of the run's data; an imported run that has seen none counts its batch as an epoch."""
    images = saved_data(run)["images"] if (run / "data.json").exists() else recipe.data.batch_size
    return max(1, images // recipe.data.batch_size)

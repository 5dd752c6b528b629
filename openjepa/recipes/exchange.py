"""Weights in and out: load an encoder, import a checkpoint as a run, export a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openjepa.convert import formats, native, released
from openjepa.convert.names import Imported, Told
from openjepa.engine import checkpoint
from openjepa.engine.checkpoint import Checkpoint
from openjepa.engine.optim import Schedule, build_optimizer
from openjepa.engine.run import environment, read_metrics
from openjepa.engine.whole import new_folder, refuse_full, write_whole
from openjepa.errors import UserError, nearest
from openjepa.methods.method import Method
from openjepa.models.encoder import Encoder, Normalise
from openjepa.models.vit import ViT
from openjepa.models.weights import load_strict
from openjepa.recipes.methods import METHODS, starting
from openjepa.recipes.pretrain import build, saved_data, saved_recipe
from openjepa.recipes.recipe import NO_WEIGHTS, Recipe, differences, override, to_yaml

NETWORKS = ("target_encoder", "encoder", "predictor")  # of I-JEPA


def load(
    source: str | Path,
    network: str | None = None,
    heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Encoder:
    """An encoder on the CPU, ready for inference.

    source: a run (its newest checkpoint), one of its checkpoint folders, an exported file or folder, a released
    checkpoint, a Hugging Face or timm folder, or hf:NAME. network: target_encoder (the default where there is one, and what
    every evaluation uses) or encoder (what it follows; MAE has it alone). heads, image_size (height, width in pixels): of
    weights from elsewhere whose shapes do not say it. Raises UserError.
    """
    if network not in (None, "target_encoder", "encoder"):
        raise UserError(f"network '{network}': one of target_encoder, encoder")
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    if is_run(Path(source)):
        if heads or image_size:
            raise UserError(f"{source} is a run and knows its heads and image size: leave them out")
        folder, found = checkpoint.locate(Path(source))
        recipe = saved_recipe(folder)
        refuse_decoder(recipe, str(source))
        network = network or METHODS[recipe.method].kind.product_name()
        if not (weights := network_weights(found, network)):
            raise UserError(f"{source} is a run of {recipe.method}, which has no {network}: leave it out")
        return ready(ViT(recipe.model), weights, recipe.data.mean, recipe.data.std, network, str(found.path))
    imported = formats.read(str(source), Told(heads, image_size))
    network = network or ("target_encoder" if "target_encoder" in imported.weights else next(iter(imported.weights)))
    if network not in imported.weights:
        raise UserError(f"{source} holds no '{network}', only {', '.join(imported.weights)}")
    encoder = ready(ViT(imported.model), imported.weights[network], imported.mean, imported.std, network, str(source))
    if imported.head:
        encoder.head, encoder.classes = nn.Linear(imported.model.dim, len(imported.classes)), imported.classes
        encoder.head.load_state_dict(imported.head)
        encoder.requires_grad_(False)
    return encoder


def is_run(path: Path) -> bool:
    """Whether a path is a run or one of its checkpoints."""
    path = path.absolute()  # also when it is named from inside
    inside = path.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", path.name) is not None
    return (path / "recipe.yaml").exists() or inside


def ready(vit: ViT, weights: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...], network: str,
          where: str) -> Encoder:  # fmt: skip
    load_strict(vit, weights, where)
    return Encoder(vit.eval().requires_grad_(False), Normalise(mean, std), network).eval()


@dataclass(frozen=True)
class Trained:
    """All networks of a run as a checkpoint has them, on the CPU, with nothing left to learn."""

    run: Path
    step: int
    recipe: Recipe
    method: Method

    @property
    def normalise(self) -> Normalise:
        return Normalise(self.recipe.data.mean, self.recipe.data.std)

    def fingerprint(self) -> str:
        """Of all networks' weights: what is made for one run is refused by another."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.method.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load_run(source: str | Path, method: str | None = None) -> Trained:
    """A run, or one of its checkpoints, with all its networks. method: what it must be of. Raises UserError."""
    folder, found = checkpoint.locate(Path(source))
    recipe = saved_recipe(folder)
    refuse_decoder(recipe, str(source))
    if method not in (None, recipe.method):
        raise UserError(f"{source} is a run of {recipe.method}, and this needs one of {method}")
    networks = build(recipe)
    load_strict(networks, found.weights(), str(found.path))
    return Trained(folder, found.step, recipe, networks.eval().requires_grad_(False))


def refuse_decoder(recipe: Recipe, source: str) -> None:
    """Raises UserError for a run that holds no encoder."""
    if not METHODS[recipe.method].kind.represents:
        raise UserError(
            f"{source} is a decoder and holds no encoder: give the run that it was made for ({recipe.rcdm.run})"
        )


def network_weights(found: Checkpoint, network: str) -> dict[str, Tensor]:
    """One network of a checkpoint, under its own names."""
    return {k.removeprefix(f"{network}."): v for k, v in found.weights().items() if k.startswith(f"{network}.")}


# ---------------------------------------------------------------- import


def import_weights(imported: Imported, source: str, out: Path, base: Recipe | None = None,
                   values: Mapping[str, str] | None = None) -> list[str]:  # fmt: skip
    """Make a run of weights from elsewhere, at the step they were saved at.

    base: the recipe that training goes on with, whose networks must be those of the weights; without one, the defaults
    around them. values: dotted keys that override it. Returns what a reader should know. Raises UserError; `out` is then
    not made.
    """
    refuse_full(out)
    recipe = override(base or around(imported), values or {})
    if recipe.first or recipe.init_from:
        raise UserError("the recipe begins with other weights than imported ones: --first {}, or --init_from null")
    if "decoder" in imported.weights and not imported.mae:
        raise UserError(f"{source} does not say how many heads its decoder has: --mae.decoder_heads N")
    predictor = imported.predictor or recipe.predictor
    painter = replace(imported.mae or recipe.mae, normalised=recipe.mae.normalised)  # which has no weights
    if imported.predictor and recipe.predictor.heads == imported.model.n_heads:
        predictor = replace(predictor, heads=recipe.predictor.heads)  # said, not left to the encoder
    free = {name: getattr(recipe.model, name) for name in NO_WEIGHTS}
    if changed := differences(
        replace(recipe, model=replace(imported.model, **free), predictor=predictor, mae=painter), recipe
    ):
        raise UserError(f"{source} is not of this recipe (its own -> the recipe's: {'; '.join(changed)})")
    method = build(recipe)
    notes = []
    weights, alone = imported.weights, len(imported.weights) == 1
    if alone:
        weights = dict.fromkeys(method.encoders(), *weights.values())
    for network, own in weights.items():
        if not hasattr(method, network):
            raise UserError(f"{source} holds a {network}, which {recipe.method} has no place for")
        load_strict(getattr(method, network), own, f"{source}'s {network}")
    optimizer = build_optimizer(method, recipe.optim)
    anew = [name for name, _ in checkpoint.learning(method) if name.partition(".")[0] not in weights]
    if alone:
        (only,), rest = imported.weights, dict.fromkeys(name.partition(".")[0] for name in anew)
        start = "both encoders start" if len(weights) > 1 else "the encoder starts"
        notes.append(f"it holds an encoder alone ({only}): {start} from it, the {' and the '.join(rest)} at random")
    elif anew and imported.step:
        notes.append(f"it holds no {anew[0].partition('.')[0]}, which the recipe's loss needs: it starts at random")
    if imported.optimizer:
        for name, parameter in checkpoint.learning(method):
            entries = {k.rpartition("/")[2]: v for k, v in imported.optimizer.items() if k.startswith(f"{name}/")}
            optimizer.state[parameter] = dict(entries)
    elif not alone:
        notes.append("no optimiser's state came in: training would begin at step 0 from these weights")
    if imported.step and imported.batch_size not in (None, recipe.data.batch_size):
        notes.append(
            f"its {imported.step} steps were of {imported.batch_size} images, the recipe's are of {recipe.data.batch_size}"
        )
    if (recipe.data.mean, recipe.data.std) != (imported.mean, imported.std):
        notes.append(f"images will be normalised by the recipe's {recipe.data.mean}, not the file's {imported.mean}")
    with new_folder(out) as folder:
        state = {
            "bad_images": {},
            "environment": environment(),
            "imported": source,
            "header": imported.header,
            "anew": anew,
        }
        checkpoint.save(folder, imported.step, method, optimizer, state)
        write_whole(folder / "recipe.yaml", to_yaml(recipe))
    return notes


def around(imported: Imported) -> Recipe:
    """The default recipe with the networks that the weights belong to: MAE's, where a class token's encoder is followed by none."""
    nothing_follows = "target_encoder" not in imported.weights
    base = starting(Recipe(), "mae") if imported.model.class_token and nothing_follows else Recipe()
    data = replace(
        base.data, mean=imported.mean, std=imported.std, batch_size=imported.batch_size or base.data.batch_size
    )
    if base.method == "mae" and isinstance(imported.hidden, float) and 0 < imported.hidden < 1:
        base = replace(base, masking=replace(base.masking, hidden=imported.hidden))
    return replace(
        base,
        model=imported.model,
        predictor=imported.predictor or base.predictor,
        mae=imported.mae or base.mae,
        data=data,
    )


# ---------------------------------------------------------------- export


def export(source: str, form: str, out: Path, network: str | None = None,
           image_size: tuple[int, int] | None = None) -> str:  # fmt: skip
    """Write one network of a run (or of anything that `load` takes) in another format, into an empty or new folder.

    form: hf (of MAE with its decoder), timm, onnx, safetensors, or released (of I-JEPA all three networks and the optimiser,
    of MAE both). network: target_encoder (the default), encoder or predictor. image_size: height and width in pixels, where
    other than the run's; the positions are interpolated once and stored. Returns the line of Python that loads it. Raises
    UserError; `out` is then not made.
    """
    if form not in formats.FORMATS:
        raise UserError(f"unknown format '{form}': one of {', '.join(formats.FORMATS)}{nearest(form, formats.FORMATS)}")
    if network not in (None, *NETWORKS):
        raise UserError(f"network '{network}': one of {', '.join(NETWORKS)}")
    refuse_full(out)
    if form == "released" and network:
        raise UserError("the released layout holds all networks: leave --network out")
    if image_size and (network == "predictor" or form not in ("hf", "timm", "onnx")):
        raise UserError(f"--image-size has no place in {form}: openjepa.load takes images of any size")
    if form == "released" and not is_run(Path(source)):
        raise UserError(f"{source} is not a run: the released layout needs all networks (openjepa import first)")
    painter = with_decoder(source) if form in ("hf", "released") and network in (None, "encoder") else None
    if painter:
        if image_size:
            raise UserError(
                "a decoder's positions are those of its images: leave --image-size out, or export as timm or onnx"
            )
        with new_folder(out) as folder:
            line = formats.MAE_WRITERS[form](folder, painter)
    elif form == "released":
        with new_folder(out) as folder:
            line = write_released(Path(source), folder / "checkpoint.pth.tar")
    elif network == "predictor":
        if form != "safetensors":
            raise UserError(f"{form} carries encoders: the predictor can be exported as safetensors or released")
        with new_folder(out) as folder:
            line = write_predictor(Path(source), folder / "predictor.safetensors")
    else:
        encoder = load(source, network)
        encoder = encoder.resized(image_size) if image_size else encoder
        with new_folder(out) as folder:
            line = formats.WRITERS[form](folder, encoder)
    return line.replace(str(folder), str(out))


def with_decoder(source: str) -> Imported | None:
    """A MAE's encoder and decoder, from a run or from elsewhere; None where there is no decoder."""
    if not is_run(Path(source)):
        found = formats.read(source, Told())
        if "decoder" in found.weights and not found.mae:
            raise UserError(f"{source} does not say how many heads its decoder has: openjepa import it first")
        return found if "decoder" in found.weights else None
    folder, saved = checkpoint.locate(Path(source))
    recipe = saved_recipe(folder)
    if recipe.method != "mae":
        return None
    weights = {network: network_weights(saved, network) for network in ("encoder", "decoder")}
    hidden = recipe.masking.hidden
    return Imported(recipe.model, weights, mae=recipe.mae, hidden=hidden, mean=recipe.data.mean, std=recipe.data.std)


def of_ijepa(run: Path, what: str) -> Recipe:
    """The recipe of a run. Raises UserError, saying whose `what` is, if it is of another method."""
    recipe = saved_recipe(run)
    if recipe.method != "ijepa":
        raise UserError(f"{run} is a run of {recipe.method}: {what}")
    return recipe


def write_predictor(source: Path, file: Path) -> str:
    """The predictor has a format of its own nowhere; as plain tensors it can leave."""
    run, found = checkpoint.locate(source)
    recipe = of_ijepa(run, "a predictor is I-JEPA's")
    about = {"predictor": asdict(recipe.predictor), "grid": recipe.model.grid, "encoder_width": recipe.model.dim}
    native.write_predictor(file, network_weights(found, "predictor"), about)
    return f"safetensors.torch.load_file({str(file)!r})"


def write_released(source: Path, file: Path) -> str:
    """All three networks, optimiser and position of a run, as the published code saves them."""
    run, found = checkpoint.locate(source)
    recipe = of_ijepa(run, "the released layouts are I-JEPA's and MAE's")
    if recipe.predictor.heads not in (None, recipe.model.n_heads):
        raise UserError("the released layout gives the predictor the encoder's heads, and predictor.heads differs")
    about: dict[str, Any] = {
        "batch_size": recipe.data.batch_size,
        "world_size": 1,
        "betas": recipe.optim.betas,
        "eps": recipe.optim.eps,
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
    }
    about |= position(run, found, recipe)
    about |= found.state().get("header", {})  # of an imported checkpoint, until training writes its own
    weights = {network: network_weights(found, network) for network in NETWORKS}
    released.write(file, recipe.model, recipe.predictor, weights, found.optimizer(), about)
    return f"torch.load({str(file)!r}, weights_only=True)['target_encoder']"


def position(run: Path, found: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Epochs done, last loss and rates. An imported run that has seen no images has its file's instead."""
    images = saved_data(run)["images"] if (run / "data.json").exists() else recipe.data.batch_size
    per_epoch = max(1, images // recipe.data.batch_size)
    schedule = Schedule(recipe.optim, recipe.schedule, per_epoch)
    last = max(0, found.step - 1)
    losses = [record["loss"] for record in read_metrics(run) if record["step"] <= found.step and "loss" in record]
    return {
        "epoch": found.step // per_epoch,
        "loss": losses[-1] if losses else float("nan"),
        "lr": schedule.lr(last),
        "weight_decay": schedule.weight_decay(last),
    }

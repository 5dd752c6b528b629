"""Decoders of runs: trained, loaded beside their run, and asked what they paint of an image."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from openjepa import __version__
from openjepa.data.decode import BadImage, Raw, decode
from openjepa.decoder.paint import Sampling, paint
from openjepa.decoder.place import Place, Rectangle, paste, snapped
from openjepa.decoder.rcdm import RCDM
from openjepa.engine import checkpoint
from openjepa.engine.device import pick_device
from openjepa.errors import UserError
from openjepa.masking import Masks
from openjepa.masking import sample as draw_masks
from openjepa.models.weights import load_strict
from openjepa.recipes.exchange import Trained, load_run
from openjepa.recipes.methods import decoder_of, refuse_another
from openjepa.recipes.pretrain import pretrain, saved_recipe
from openjepa.recipes.recipe import Recipe, override

PALE = 0.3  # of its contrast that is left where the encoder does not look
OF_THE_RUN = ("method", "model.", "data.mean", "data.std", "rcdm.run", "rcdm.step", "rcdm.fingerprint")

# ---------------------------------------------------------------- training


def recipe_for(base: Recipe, source: str, trained: Trained) -> Recipe:
    """A decoder's recipe around a run: its model, its sizes of blocks, its normalisation."""
    own = trained.recipe
    masking, augment = base.masking, base.augment
    if own.method == "ijepa" and own.masking.strategy == "multiblock":
        masking = replace(masking, target_scale=own.masking.target_scale, target_aspect=own.masking.target_aspect)
    if augment.crop_aspect == (1.0, 1.0):
        height, width = own.model.image_size
        augment = replace(augment, crop_aspect=(width / height, width / height))
    data = replace(base.data, mean=own.data.mean, std=own.data.std)
    rcdm = replace(base.rcdm, run=where(source), step=trained.step, fingerprint=trained.fingerprint())
    return replace(base, model=own.model, masking=masking, data=data, augment=augment, rcdm=rcdm)


def train(source: str, data: str, out: Path, base: Recipe | None, values: Mapping[str, str], console: Console) -> RCDM:
    """Train a decoder for a run, or go on with the one in `out`. base: None where that says it.

    Raises UserError, and Interrupted after a signal.
    """
    for name in values:
        if name.startswith(OF_THE_RUN):
            raise UserError(f"--{name} is what the run says, and no choice of its decoder's")
    trained = load_run(source)
    begun = saved_recipe(out) if (out / "recipe.yaml").exists() else None
    if begun:
        refuse_others(begun, str(out))
        refuse_another(begun.rcdm, trained)
    if base:
        refuse_others(base, "this recipe")
        base = recipe_for(base, source, trained)
    elif begun:
        base = replace(begun, rcdm=replace(begun.rcdm, run=where(source)))
    else:
        raise UserError("which recipe? give --recipe NAME (openjepa recipes lists them) or --config FILE.yaml")
    method = pretrain(override(base, values), data, out, console)
    assert isinstance(method, RCDM)
    return method


def where(source: str) -> str:
    return str(Path(source).absolute())


def refuse_others(recipe: Recipe, what: str) -> None:
    if recipe.method != "rcdm":
        raise UserError(
            f"{what} is of {recipe.method}, which is no decoder: openjepa decode train makes them, by recipes rcdm_…"
        )


# ---------------------------------------------------------------- asking


@dataclass(frozen=True)
class Decoder:
    """A trained decoder beside the run that it was made for, on a device."""

    trained: Trained
    recipe: Recipe
    method: RCDM
    step: int

    @property
    def device(self) -> torch.device:
        return self.method.device

    @torch.no_grad()
    def conditions(self, images: Tensor, masks: Masks) -> Tensor:
        """images: uint8 [B, C, H, W]. Returns float32 [B, D]."""
        return self.method.condition(self.method.normalise(images.to(self.device)), masks.to(self.device))

    def about(self, sampling: Sampling) -> dict[str, Any]:
        """What its pictures depend on."""
        return {
            "openjepa": __version__,
            "command": shlex.join(["openjepa", *sys.argv[1:]]),
            "run_fingerprint": self.recipe.rcdm.fingerprint,
            "run_step": self.trained.step,
            "decoder_step": self.step,
            "of": self.recipe.rcdm.of,
            "paint": self.recipe.rcdm.paint,
            "networks": self.recipe.rcdm.networks,
            **asdict(sampling),
        }


def load_decoder(source: str, decoder: str, device: str = "auto") -> Decoder:
    """A decoder and its run. Raises UserError where it was made for another."""
    folder, found = checkpoint.locate(Path(decoder))
    recipe = saved_recipe(folder)
    refuse_others(recipe, decoder)
    trained = load_run(source)
    method = decoder_of(recipe, trained)
    load_strict(method, found.weights(), str(found.path))
    return Decoder(trained, recipe, method.to(pick_device(device)).eval(), found.step)


@dataclass(frozen=True)
class Shown:
    """An image as it came, and where its block is. pixels: uint8 [C, H, W], upright; seen: what the encoder gets of it."""

    name: str
    pixels: Tensor
    seen: Tensor
    place: Place


def upright(raw: Raw, channels: int) -> np.ndarray:
    """All pixels of an image, uint8 [H, W, channels]. Raises BadImage."""
    size: list[tuple[int, int]] = []

    def whole(width: int, height: int) -> tuple[float, float, float, float]:
        size.append((height, width))
        return 0, 0, width, height

    decode(raw, whole, (1, 1), channels)
    return decode(raw, whole, size[0], channels)


def show(decoder: Decoder, name: str, raw: Raw, box: Rectangle | None, number: int, seed: int) -> Shown:
    """box: x, y, width, height in the image's pixels; without one a block of (seed, number) is drawn, as in training.

    Raises UserError.
    """
    model, recipe = decoder.trained.recipe.model, decoder.recipe
    try:
        pixels = upright(raw, model.channels)
    except BadImage as error:
        raise UserError(f"{name}: {error}") from error
    height, width = pixels.shape[:2]
    try:
        whole = snapped(box or (width // 2, height // 2, 1, 1), (width, height), model.grid, model.patch_size)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if box is None:
        masks = draw_masks(recipe.masking, model.grid, seed, 0, np.array([number]))
        rows, columns = np.divmod(masks.targets[0, 0].numpy(), model.grid[1])
        whole = replace(whole, rows=(int(rows[0]), int(rows[-1]) + 1), columns=(int(columns[0]), int(columns[-1]) + 1))
    seen = decode(pixels, lambda w, h: whole.window, model.image_size, model.channels)
    as_tensor = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in (pixels, seen)]
    return Shown(name, as_tensor[0], as_tensor[1], whole)


def hypotheses(decoder: Decoder, shown: Sequence[Shown], samples: int, sampling: Sampling) -> list[Tensor]:
    """Each image with each sample in its place, uint8 [K, C, H, W] of its own size; or, of a decoder that paints whole images,
    what the encoder sees painted anew."""
    conditions = torch.cat([decoder.conditions(s.seen[None], s.place.masks()) for s in shown])
    painted = paint(decoder.method, conditions, samples, sampling)
    return [placed(decoder, s, squares) for s, squares in zip(shown, painted, strict=True)]


def placed(decoder: Decoder, shown: Shown, squares: Tensor) -> Tensor:
    """Squares [K, C, S, S] from 0 to 1, put where they belong."""
    window = [round(side) for side in shown.place.window]
    whole = decoder.recipe.rcdm.paint == "image"
    box = (window[0], window[1], window[2], window[3]) if whole else shown.place.box
    return paste(shown.pixels[None].expand(len(squares), -1, -1, -1), squares, [box] * len(squares))


def hidden(shown: Shown) -> Tensor:
    """The image with its block grey, and pale where the encoder does not look."""
    left, top, right, bottom = shown.place.box
    result = shown.pixels.clone()
    seen = torch.zeros(result.shape[1:], dtype=torch.bool)
    x0, y0, x1, y1 = (round(side) for side in shown.place.window)
    seen[y0:y1, x0:x1] = True
    result[:3] = torch.where(seen, result[:3], (255 - (255 - result[:3].float()) * PALE).to(torch.uint8))
    result[:, top:bottom, left:right] = 128
    return result


def refuse_none(**counts: int) -> None:
    """Raises UserError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name} {count}: give 1 or more")

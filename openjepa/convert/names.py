"""What a file of weights says about the network it belongs to: sizes from shapes, positions checked, nothing left over.

Parameter names inside an encoder are timm's, which the release shares; the fixed positions are stored there and computed
here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openjepa.errors import UserError
from openjepa.methods.mae import MAEConfig
from openjepa.models.layers import sincos_positions
from openjepa.models.predictor import PredictorConfig
from openjepa.models.vit import SIZES, ViT, ViTConfig
from openjepa.models.weights import check_fit

State = dict[str, Tensor]

NETWORK = "openjepa_network"  # a key that other libraries do not look at: which network an exported encoder is

TOKENS = "prefix_tokens"  # ours for what others call cls_token

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Imported:
    """Weights under this project's names, and what they say about their networks.

    weights: by network: one encoder alone, I-JEPA's encoder, predictor and target_encoder, or MAE's encoder and decoder.
    mae: of weights with a decoder, where its heads are known. optimizer: by network, parameter and kind (exp_avg,
    exp_avg_sq, step), or empty.
    """

    model: ViTConfig
    weights: dict[str, State]
    predictor: PredictorConfig | None = None
    optimizer: State = field(default_factory=dict)
    step: int = 0
    batch_size: int | None = None  # images in a step over all processes, where the file knows
    processes: int = 1
    header: dict[str, Any] = field(default_factory=dict)  # what else a released checkpoint says of itself
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    head: State = field(default_factory=dict)  # of a classifier
    classes: list[str] = field(default_factory=list)
    mae: MAEConfig | None = None
    hidden: float | None = None  # share of the patches that MAE hides, where the file knows


@dataclass(frozen=True)
class Told:
    """What shapes cannot say, told by the user."""

    heads: int | None = None
    image_size: tuple[int, int] | None = None
    decoder_heads: int | None = None


def encoder_config(state: Mapping[str, Tensor], told: Told, where: str) -> ViTConfig:
    """The encoder's configuration from the shapes of its state dict (with `pos_embed`).

    Raises UserError where the shapes are no ViT's of this kind, or do not say the number of heads or the grid.
    """
    try:
        width, channels, patch, across = state["patch_embed.proj.weight"].shape
        tokens = state["pos_embed"].shape[1] - int("cls_token" in state)
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where} is not an encoder known here: {first_missing(error)}") from error
    if patch != across:
        raise UserError(f"{where} has patches of {patch}x{across} pixels: only square ones are known here")
    depth = blocks(state)
    known = [(name, values) for name, values in SIZES.items() if values[0] == width]
    heads = told.heads if told.heads is not None else (known[0][1][2] if known else None)
    if heads is None:
        widths = ", ".join(f"{values[0]} ({name})" for name, values in SIZES.items())
        raise UserError(
            f"{where} is {width} wide, and no known size is ({widths}): say its number of heads, "
            "openjepa import --model.heads N or openjepa.load(…, heads=N)"
        )
    side = math.isqrt(tokens)
    image_size = told.image_size or (side * patch, side * patch)
    if (image_size[0] // patch) * (image_size[1] // patch) != tokens:
        here = f"{where} has {tokens} patches of {patch} pixels"
        if told.image_size:
            raise UserError(f"{here}: that is not an image of {image_size[0]}x{image_size[1]}")
        raise UserError(
            f"{here}, and no square image has as many: say its size, openjepa import --model.image_size H,W or "
            "openjepa.load(…, image_size=(H, W))"
        )
    return ViTConfig(
        size=known[0][0] if known else "Ti",
        image_size=image_size,
        patch_size=patch,
        channels=channels,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio(width, hidden),
        class_token="cls_token" in state,
    )


def blocks(state: Mapping[str, Tensor]) -> int:
    """How many there are; one that is missing between others is missed by its name when they are loaded."""
    return len({found[1] for name in state if (found := re.match(r"blocks\.(\d+)\.", name))})


def mlp_ratio(width: int, hidden: int) -> float:
    """The known ratio that gives exactly this hidden width, else their quotient."""
    for ratio in sorted({values[3] for values in SIZES.values()}):
        if int(width * ratio) == hidden:
            return ratio
    return (hidden + 0.5) / width  # so that the whole part of width * ratio is hidden, whatever the rounding


def predictor_config(state: Mapping[str, Tensor], where: str) -> PredictorConfig:
    """The predictor's, from its state dict under this project's names; it has the encoder's heads."""
    try:
        width = state["embed.weight"].shape[0]
        depth = blocks(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"{where} is not the predictor of an I-JEPA: {first_missing(error)}") from error
    return PredictorConfig(width=width, depth=depth)


def as_stored(positions: Tensor, class_token: bool) -> Tensor:
    """Positions [N, D] as other code stores them, [1, N, D], or [1, 1 + N, D] with zeros for the class token."""
    return F.pad(positions, (0, 0, int(class_token), 0))[None]


def check_positions(stored: Tensor, grid: tuple[int, int], where: str, class_token: bool = False) -> None:
    """Stored positions must be the fixed ones that are computed here. stored: as of `as_stored`. Raises UserError."""
    fixed = as_stored(sincos_positions(grid, stored.shape[-1]), class_token)
    if stored.shape != fixed.shape:
        raise UserError(f"{where} has shape {list(stored.shape)}: expected {list(fixed.shape)}")
    error = float((stored - fixed.to(stored.dtype)).abs().max())
    if not error < 1e-5:
        raise UserError(
            f"{where} are not the fixed sine-cosine positions of a {grid[0]}x{grid[1]} grid (off by {error:.2g}): "
            "they were learned, or interpolated to another image size"
        )


def without_prefix(state: Mapping[str, Tensor], prefix: str, where: str) -> State:
    """Names without a prefix that some or all have. Raises UserError where two become one."""
    found: State = {}
    for name, value in state.items():
        own = name.removeprefix(prefix)
        if own in found:
            raise UserError(f"{where} holds '{own}' twice, with '{prefix}' before it and without")
        found[own] = value
    return found


def agrees(said: Mapping[str, Any], model: ViTConfig, names: Mapping[str, str], where: str) -> None:
    """What a configuration says must be what the weights' shapes say. names: its keys, and ours. Raises UserError."""
    for theirs, ours in names.items():
        if (value := said.get(theirs)) is not None and value != getattr(model, ours):
            raise UserError(
                f"{where} says {theirs} {value!r}, and its weights have {getattr(model, ours)!r}: is it whole?"
            )


def first_missing(error: Exception) -> str:
    return f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else "its shapes are not a ViT's"


def without_positions(
    state: Mapping[str, Tensor], name: str, grid: tuple[int, int], where: str, class_token: bool = False
) -> State:
    """A state dict less its fixed positions, which are checked."""
    if name not in state:
        raise UserError(f"{where} has no '{name}'")
    check_positions(state[name], grid, f"{where}'s {name}", class_token)
    return {k: v for k, v in state.items() if k != name}


def encoder_alone(state: Mapping[str, Tensor], told: Told, where: str) -> tuple[ViTConfig, State]:
    """The configuration and weights of an encoder that is stored by itself with its positions. Raises UserError."""
    config = encoder_config(state, told, where)
    own = without_positions(state, "pos_embed", config.grid, where, config.class_token)
    own = {TOKENS if k == "cls_token" else k: v.flatten(0, 1) if k == "cls_token" else v for k, v in own.items()}
    check_whole(config, own, where)
    return config, own


def check_whole(config: ViTConfig, state: State, where: str) -> None:
    """A state dict without positions is this encoder's, nothing missing and nothing left over. Raises UserError."""
    with torch.device("meta"):
        expected = ViT(config).state_dict()
    check_fit(expected, state, where)


def with_positions(encoder: ViT) -> State:
    """An encoder's state dict as other libraries store it: its class token, and positions, interpolated ones as they are."""
    state, class_token = encoder.state_dict(), encoder.config.class_token
    token = {"cls_token": state.pop(TOKENS)[None]} if class_token else {}
    return {**token, "pos_embed": as_stored(encoder.get_buffer("positions"), class_token), **state}


def given_statistics(mean: Any, std: Any, channels: int, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that a file gives, or else ImageNet's (0.5 where there are not three channels)."""
    grey = (0.5,) * channels
    mean = tuple(map(float, mean)) if mean is not None else IMAGENET_MEAN if channels == 3 else grey
    std = tuple(map(float, std)) if std is not None else IMAGENET_STD if channels == 3 else grey
    if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise UserError(
            f"{where} normalises by mean {mean} and deviation {std}: one number above 0 for each of {channels} channels"
        )
    return mean, std


def check_plain(model: ViTConfig, form: str, class_token: bool = False) -> None:
    """Raises UserError for what a format cannot carry. class_token: whether it can carry one."""
    extras = {"class_token": model.class_token and not class_token, "registers": model.registers,
              "layer_scale": model.layer_scale is not None, "qk_norm": model.qk_norm}  # fmt: skip
    if used := [f"model.{name}" for name, value in extras.items() if value]:
        raise UserError(f"{form} cannot carry {', '.join(used)}: export as safetensors or onnx")


def tensors(state: Mapping[Any, Any], where: str) -> State:
    """A state dict that holds what one should: names and dense, finite, floating-point tensors. Raises UserError."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise UserError(f"{where} holds {name!r}, which is no tensor of weights")
        if value.numel() > value.untyped_storage().nbytes() // value.element_size():  # a few bytes shown as many
            raise UserError(f"{where}: {name} has {value.numel()} numbers, and the file holds fewer of them")
        if not value.is_floating_point():
            raise UserError(f"{where}: {name} has numbers of type {value.dtype}, not floating-point ones")
        if not torch.isfinite(value).all():
            raise UserError(f"{where}: {name} is not finite")
    return dict(state)

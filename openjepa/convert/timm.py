"""timm's Vision Transformer with fixed positions, in and out: the encoder alone, with a class token or without."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from openjepa.convert.names import (
    NETWORK,
    Imported,
    State,
    Told,
    agrees,
    check_plain,
    encoder_alone,
    given_statistics,
    with_positions,
)
from openjepa.errors import UserError
from openjepa.models.encoder import Encoder
from openjepa.models.vit import ViTConfig

NAMES = {("H", 14, 224): "vit_huge_patch14_gap_224", ("H", 16, 448): "vit_huge_patch16_gap_448",
         ("G", 16, 224): "vit_giant_patch16_gap_224"}  # fmt: skip
SAID = {"embed_dim": "dim", "depth": "n_blocks", "patch_size": "patch_size", "in_chans": "channels"}
ARGUMENTS = (*SAID, "img_size", "num_heads", "mlp_ratio", "dynamic_img_size", "class_token")
OTHERS = "vit_base_patch16_gap_224"  # every other size is this architecture with arguments


def write(folder: Path, encoder: Encoder) -> str:
    """`timm.create_model("local-dir:FOLDER", pretrained=True)`, or with `checkpoint_path`. Raises UserError.

    Returns the line of Python that loads it.
    """
    config = encoder.vit.config
    check_plain(config, "timm's vit_*_gap", class_token=True)
    state = with_positions(encoder.vit)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    architecture, arguments = model_arguments(config)
    mean, std = encoder.statistics()
    about = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.dim,
        "global_pool": "avg",
        "model_args": arguments,
        NETWORK: encoder.network,
        "pretrained_cfg": {
            "input_size": [config.channels, *config.image_size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    extra = "".join(f", {k}={v!r}" for k, v in arguments.items())
    file = str(folder / "model.safetensors")
    return f"timm.create_model({architecture!r}, num_classes=0, checkpoint_path={file!r}{extra})"


def model_arguments(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The registered architecture, and what differs from it."""
    height, width = config.image_size
    plain = ViTConfig(size=config.size, image_size=(height, height), patch_size=config.patch_size)
    if config == plain and (name := NAMES.get((config.size, config.patch_size, height))):
        return name, {}
    return OTHERS, {
        "img_size": [height, width],
        "patch_size": config.patch_size,
        "in_chans": config.channels,
        "embed_dim": config.dim,
        "depth": config.n_blocks,
        "num_heads": config.n_heads,
        "mlp_ratio": config.mlp_ratio,
        **({"class_token": True} if config.class_token else {}),  # which the mean over patches leaves out
    }


def read(state: State, told: Told, where: str, about: dict[str, Any] | None = None) -> Imported:
    """timm's state dict, with the config.json beside it if there is one. Raises UserError naming what is odd."""
    about = about or {}
    statistics, arguments = about.get("pretrained_cfg", {}), about.get("model_args", {})
    architecture = str(about.get("architecture", OTHERS))
    if not re.fullmatch(r"vit_(\w+_gap|[a-z]+_patch\d+)_\d+(\.\w+)?", architecture):
        raise UserError(f"{where} is a {architecture}: known here are vit_*_gap_*, and MAE's vit_*_patch*_*")
    if odd := [name for name in arguments if name not in ARGUMENTS]:
        raise UserError(f"{where} was built with {odd[0]} {arguments[odd[0]]!r}, which encoders here are not")
    size = arguments.get("img_size")
    told = Told(
        heads=told.heads if told.heads is not None else arguments.get("num_heads"),
        image_size=told.image_size or ((int(size[0]), int(size[1])) if isinstance(size, list) else None),
    )
    if any(name.startswith("fc_norm.") for name in state):
        raise UserError(f"{where} normalises after pooling ('fc_norm'): encoders here normalise each patch")
    config, state = encoder_alone(state, told, where)
    agrees(arguments, config, SAID, where)
    mean, std = given_statistics(statistics.get("mean"), statistics.get("std"), config.channels, where)
    network = about.get(NETWORK, "encoder" if config.class_token else "target_encoder")
    return Imported(config, {network: state}, mean=mean, std=std)

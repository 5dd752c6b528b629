"""One safetensors file: an encoder's weights, with its configuration in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from openjepa.convert.names import Imported, State, check_whole
from openjepa.errors import UserError
from openjepa.models.encoder import Encoder
from openjepa.models.vit import ViTConfig

KEY = "openjepa"  # of the header's entry
PREDICTOR = "openjepa predictor"  # the same of a file that holds a predictor, which nothing reads back


def write(file: Path, encoder: Encoder) -> None:
    mean, std = encoder.statistics()
    about = {"network": encoder.network, "model": asdict(encoder.vit.config), "mean": mean, "std": std}
    state = {k: v.contiguous() for k, v in encoder.vit.state_dict().items()}
    save_file(state, file, {KEY: json.dumps(about), "format": "pt"})


def write_predictor(file: Path, state: State, about: Mapping[str, Any]) -> None:
    """Plain tensors, with the predictor's sizes in the header."""
    save_file({k: v.contiguous() for k, v in state.items()}, file, {PREDICTOR: json.dumps(about), "format": "pt"})


def read(state: State, header: Mapping[str, str], where: str) -> Imported:
    """Raises UserError if weights and header disagree."""
    try:
        about: dict[str, Any] = json.loads(header[KEY])
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["model"].items()}
        config = ViTConfig(**values)
        mean, std = tuple(map(float, about["mean"])), tuple(map(float, about["std"]))
        network = {name: name for name in ("target_encoder", "encoder")}[about["network"]]
        if len(mean) != config.channels or len(std) != config.channels or min(std) <= 0:
            raise ValueError("mean and std need a number above 0 for each channel")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} has a header that this version does not understand ({error})") from error
    check_whole(config, state, where)
    return Imported(config, {network: state}, mean=mean, std=std)

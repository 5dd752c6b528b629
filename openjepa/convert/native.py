"""One safetensors file: an encoder's weights, a classifier's head if it has one, its configuration in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from openjepa.convert.names import Imported, State, check_whole, given_statistics
from openjepa.errors import UserError
from openjepa.models.encoder import Encoder
from openjepa.models.vit import ViTConfig
from openjepa.models.weights import check_fit

KEY = "openjepa"  # of the header's entry
NETWORKS = ("target_encoder", "encoder", "finetuned")
HEAD = "head."  # what the names of a classifier's last layer begin with
PREDICTOR = "openjepa predictor"  # the same of a file that holds a predictor, which nothing reads back


def write(file: Path, encoder: Encoder) -> None:
    mean, std = encoder.statistics()
    about = {"network": encoder.network, "model": asdict(encoder.vit.config), "mean": mean, "std": std}
    state = {k: v.contiguous() for k, v in encoder.vit.state_dict().items()}
    if encoder.head is not None:
        about["classes"] = encoder.classes
        state |= {HEAD + k: v.contiguous() for k, v in encoder.head.state_dict().items()}
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
        network = {name: name for name in NETWORKS}[about["network"]]
        classes = list(map(str, about.get("classes", [])))
        mean, std = given_statistics(about["mean"], about["std"], config.channels, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} has a header that this version does not understand ({error})") from error
    head = {k: v for k, v in state.items() if k.startswith(HEAD)}
    expected = nn.Linear(config.dim, len(classes)).state_dict(prefix=HEAD) if classes else {}
    check_fit(expected, head, where)
    state = {k: v for k, v in state.items() if not k.startswith(HEAD)}
    check_whole(config, state, where)
    return Imported(
        config,
        {network: state},
        mean=mean,
        std=std,
        head={k.removeprefix(HEAD): v for k, v in head.items()},
        classes=classes,
    )

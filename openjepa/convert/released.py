"""Checkpoints in the released layout (`*.pth.tar`), in and out.

A pickle of `encoder`, `predictor`, `target_encoder` (parameters under `module.`, fixed positions among them), `opt`
(AdamW in four groups: matrices of encoder and predictor, then their vectors), `scaler`, `epoch`, `loss`, `batch_size`,
`world_size`, `lr`. Read without running code from it.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openjepa.convert.names import (
    Imported,
    State,
    Told,
    check_plain,
    encoder_config,
    given_statistics,
    predictor_config,
    tensors,
    without_positions,
    without_prefix,
)
from openjepa.errors import UserError, first_line
from openjepa.models.layers import sincos_positions
from openjepa.models.predictor import Predictor, PredictorConfig
from openjepa.models.vit import ViT, ViTConfig
from openjepa.models.weights import check_fit

NETWORKS = ("encoder", "predictor", "target_encoder")
POSITIONS = {"encoder": "pos_embed", "predictor": "predictor_pos_embed", "target_encoder": "pos_embed"}
PREFIXES = {"encoder": "", "predictor": "predictor_", "target_encoder": ""}  # of most names
MOMENTS = ("exp_avg", "exp_avg_sq")
HEADER = ("epoch", "loss", "batch_size", "world_size", "lr")
KNOWN = (*NETWORKS, *HEADER, "opt", "scaler", "mean", "std")


def read_pickle(file: Path) -> Any:
    """What a pickle holds, if it is tensors and plain values alone. Raises UserError; nothing in it is ever run."""
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )  # mapped, not read
    except pickle.UnpicklingError as error:
        if wants := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} is refused: it asks for {wants[1]}, and what is more than weights could run code of its author"
            ) from error
        raise UserError(f"{file} is no checkpoint, or a damaged one: is it whole?") from error
    except Exception as error:  # what damaged bytes make a reader do is without bounds
        if "TorchScript" in str(error):
            raise UserError(f"{file} is refused: a TorchScript archive is a program, not weights") from error
        raise UserError(f"{file} cannot be read as a checkpoint ({first_line(error)}): is it whole?") from error


def is_released(saved: Any) -> bool:
    return isinstance(saved, Mapping) and "target_encoder" in saved


def read(saved: Mapping[str, Any], told: Told, where: str) -> Imported:
    """Weights, optimiser state and step of a released checkpoint. Raises UserError naming what is missing or odd."""
    for network in NETWORKS:
        if not isinstance(saved.get(network), Mapping):
            raise UserError(f"{where} has no '{network}': a released checkpoint holds {', '.join(NETWORKS)}")
    if extra := [str(name) for name in saved if name not in KNOWN]:
        raise UserError(f"{where} also holds {', '.join(extra[:3])}, which a released checkpoint does not: take it out")
    raw = {
        network: without_prefix(tensors(saved[network], f"{where}'s {network}"), "module.", f"{where}'s {network}")
        for network in NETWORKS
    }
    model = encoder_config(raw["target_encoder"], told, f"{where}'s target_encoder")
    if model.class_token:
        raise UserError(f"{where} has a class token ('cls_token'): the encoders of this layout have none")
    own: dict[str, State] = {}
    for network, state in raw.items():
        state = without_positions(state, POSITIONS[network], model.grid, f"{where}'s {network}")
        own[network] = without_prefix(state, PREFIXES[network], f"{where}'s {network}")
    predictor = predictor_config(own["predictor"], f"{where}'s predictor")
    for network, expected in shapes(model, predictor).items():
        check_fit(expected, own[network], f"{where}'s {network}")
    optimizer, step = read_optimizer(saved.get("opt"), raw, where)
    mean, std = given_statistics(saved.get("mean"), saved.get("std"), model.channels, where)
    header = {k: saved[k] for k in HEADER if isinstance(saved.get(k), int | float)}
    if groups := (saved.get("opt") or {}).get("param_groups"):
        header["weight_decay"] = groups[0].get("weight_decay")
    batch, processes = header.get("batch_size", 0), header.get("world_size", 1)
    if not (isinstance(batch, int) and isinstance(processes, int) and batch >= 0 and processes >= 1):
        raise UserError(f"{where} has batch_size {batch} and world_size {processes}: expected whole numbers above 0")
    return Imported(model, own, predictor, optimizer, step, batch * processes or None, processes, header, mean, std)


def shapes(model: ViTConfig, predictor: PredictorConfig) -> dict[str, State]:
    """The three networks' state dicts without their numbers, in the order that optimisers count parameters by."""
    with torch.device("meta"):
        networks = {"encoder": ViT(model), "predictor": Predictor(predictor, model), "target_encoder": ViT(model)}
    return {network: module.state_dict() for network, module in networks.items()}


def own_name(network: str, released: str) -> str:
    return released.removeprefix(PREFIXES[network])


def released_name(network: str, own: str) -> str:
    return own if own == "mask_token" else PREFIXES[network] + own


def stored(network: str, weights: State, grid: tuple[int, int], width: int) -> State:
    """A network's weights under the release's names, with the fixed positions where it keeps them: after its tokens."""
    named = {released_name(network, name): value for name, value in weights.items()}
    token = {name: named.pop(name) for name in ("mask_token",) if name in named}
    return {**token, POSITIONS[network]: sincos_positions(grid, width)[None], **named}


def order(states: Mapping[str, Mapping[str, Tensor]]) -> list[list[tuple[str, str]]]:
    """The release's four groups: matrices of encoder and predictor, then the rest of each, as (network, name)."""
    learn = ("encoder", "predictor")

    def decays(name: str, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and "bias" not in name

    return [[(n, k) for k, v in states[n].items() if decays(k, v) is decay] for decay in (True, False) for n in learn]


def read_optimizer(opt: Any, raw: Mapping[str, State], where: str) -> tuple[State, int]:
    """AdamW's moments under our parameters' names, and the step; nothing if the file has none."""
    if not isinstance(opt, Mapping) or not opt.get("state"):
        return {}, 0
    if any(group.get("amsgrad") for group in opt["param_groups"]):
        raise UserError(f"{where}'s optimiser is AMSGrad, which is not done here")
    groups = order(raw)
    stored = [group["params"] for group in opt["param_groups"]]
    if [len(g) for g in stored] != [len(g) for g in groups]:
        raise UserError(
            f"{where}'s optimiser has groups of {[len(g) for g in stored]} parameters: expected {[len(g) for g in groups]}"
        )
    found: State = {}
    steps: set[float] = set()
    for names, indices in zip(groups, stored, strict=True):
        for (network, name), index in zip(names, indices, strict=True):
            if name == POSITIONS[network]:
                continue  # fixed: never moved
            own = f"{network}.{own_name(network, name)}"
            entry = opt["state"].get(index)
            if entry is None:
                raise UserError(f"{where}'s optimiser has no state for {network}.{name}")
            for moment in MOMENTS:
                tensor = tensors({moment: entry.get(moment)}, f"{where}'s optimiser, {network}.{name}")[moment]
                if tensor.shape != raw[network][name].shape:
                    raise UserError(f"{where}'s optimiser has no {moment} that fits {network}.{name}")
                found[f"{own}/{moment}"] = tensor.float()
            steps.add(float(entry["step"]))
            found[f"{own}/step"] = torch.tensor(float(entry["step"]))
    extra = set(opt["state"]) - {index for indices in stored for index in indices}
    if extra or len(steps) != 1 or not (step := steps.pop()) >= 0:
        raise UserError(f"{where}'s optimiser has state of other parameters, or steps that disagree")
    return found, int(step)


def write(file: Path, model: ViTConfig, predictor: PredictorConfig, weights: Mapping[str, State], optimizer: State,
          about: dict[str, Any]) -> None:  # fmt: skip
    """All three networks and the optimiser in the released layout.

    weights: by network, this project's names. about: epoch, loss, batch_size, world_size, lr, weight_decay, betas, eps, and
    the images' mean and std, which the release has no place for and does not look at. Raises UserError for networks that
    the layout cannot carry.
    """
    check_plain(model, "the released layout")
    ordered = {n: {k: weights[n][k] for k in expected} for n, expected in shapes(model, predictor).items()}
    states = {
        network: stored(network, ordered[network], model.grid, predictor.width if network == "predictor" else model.dim)
        for network in NETWORKS
    }
    about = dict(about)
    rates = {name: about.pop(name) for name in ("weight_decay", "betas", "eps")}
    groups, state, index = [], {}, 0
    for number, names in enumerate(order(states)):
        indices = []
        for network, name in names:
            own = f"{network}.{own_name(network, name)}"
            entry = {key: optimizer[f"{own}/{key}"] for key in ("step", *MOMENTS) if f"{own}/{key}" in optimizer}
            if entry:
                state[index] = entry
            indices.append(index)
            index += 1
        group: dict[str, Any] = {"lr": about["lr"], **rates}
        if number >= 2:
            group |= {"WD_exclude": True, "weight_decay": 0}
        groups.append({**group, "amsgrad": False, "params": indices})
    saved = {network: {f"module.{k}": v for k, v in states[network].items()} for network in NETWORKS}
    torch.save({**saved, "opt": {"state": state, "param_groups": groups}, "scaler": None, **about}, file)

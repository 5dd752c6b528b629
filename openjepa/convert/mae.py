"""MAE checkpoints in the released layout (`*.pth`), in and out: a pickle of `model`, one state dict for encoder and decoder.

The encoder's names are timm's; `cls_token` and the fixed positions, zero for it, are stored; a pixel of a painted patch comes
as row, column, channel, where ours is channel, row, column. The encoders published for fine-tuning lack the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openjepa.convert.names import (
    TOKENS,
    Imported,
    State,
    Told,
    as_stored,
    blocks,
    check_plain,
    encoder_alone,
    given_statistics,
    tensors,
    without_positions,
)
from openjepa.errors import UserError
from openjepa.methods.mae import MAE, MAEConfig
from openjepa.models.layers import sincos_positions
from openjepa.models.weights import check_fit

DECODER = {  # the beginnings of released names, and ours
    "decoder_embed": "embed",
    "decoder_blocks": "blocks",
    "decoder_norm": "norm",
    "decoder_pred": "proj",
    "mask_token": "mask_token",
    "decoder_pos_embed": "pos_embed",
}
OURS = "openjepa"  # a key that the release does not look at: what its layout has no place for


def is_mae(saved: Any) -> bool:
    return isinstance(saved, Mapping) and isinstance(saved.get("model"), Mapping)


def own(name: str) -> tuple[str, str]:
    """A released parameter's network and its name there."""
    for theirs, ours in DECODER.items():
        if name.startswith(theirs):
            return "decoder", ours + name.removeprefix(theirs)
    return "encoder", name


def pixels(tensor: Tensor, order: tuple[int, int]) -> Tensor:
    """A patch's pixels, which the first dimension counts, in ours of their orders, (-1, channels), or back, (channels, -1)."""
    return tensor.unflatten(0, order).transpose(0, 1).flatten(0, 1)


def read(saved: Mapping[str, Any], told: Told, where: str) -> Imported:
    """Encoder and, where it is there, decoder. An optimiser's state is left. Raises UserError naming what is missing or odd."""
    about = saved.get(OURS, {})
    heads, size = about.get("heads"), about.get("image_size")
    told = Told(
        heads=told.heads or heads,
        image_size=told.image_size or (size and tuple(size)),
        decoder_heads=told.decoder_heads or about.get("decoder_heads"),
    )
    args = vars(saved["args"]) if "args" in saved else {}
    normalised = bool(about.get("normalised", args.get("norm_pix_loss", True)))
    found = read_state(tensors(saved["model"], where), told, where, normalised, about.get("mean"), about.get("std"))
    return replace(found, hidden=about.get("hidden", args.get("mask_ratio")))


def read_state(state: Mapping[str, Tensor], told: Told, where: str, normalised: bool, mean: Any = None,
               std: Any = None) -> Imported:  # fmt: skip
    """As read, of the state dict under the release's names. mean, std: that images were normalised with, where known."""
    if "cls_token" not in state:
        raise UserError(f"{where} has no 'cls_token': it is no MAE")
    parts: dict[str, State] = {"encoder": {}, "decoder": {}}
    for name, value in state.items():
        network, rest = own(name)
        parts[network][rest] = value
    model, encoder = encoder_alone(parts["encoder"], told, where)
    mean, std = given_statistics(mean, std, model.channels, where)
    if not (decoder := parts["decoder"]):
        return Imported(model, {"encoder": encoder}, mean=mean, std=std)
    if "embed.weight" not in decoder:
        raise UserError(f"{where} has no 'decoder_embed.weight'")
    width, depth = len(decoder["embed.weight"]), blocks(decoder)
    decoder = without_positions(decoder, "pos_embed", model.grid, f"{where}'s decoder", class_token=True)
    known = told.decoder_heads or (MAEConfig.decoder_heads if width == MAEConfig.decoder_width else None)
    config = MAEConfig(decoder_width=width, decoder_depth=depth, decoder_heads=known or 1, normalised=normalised)
    with torch.device("meta"):
        check_fit(MAE(model, config).decoder.state_dict(), decoder, f"{where}'s decoder")
    decoder |= {k: pixels(v, (-1, model.channels)) for k, v in decoder.items() if k.startswith("proj.")}
    return Imported(model, {"encoder": encoder, "decoder": decoder}, mae=config if known else None, mean=mean, std=std)


def stored(whole: Imported) -> State:
    """Encoder and decoder, or the encoder alone, under the release's names. Raises UserError for what it cannot carry."""
    model = whole.model
    if not model.class_token:
        raise UserError("MAE's layout has a class token, and this encoder has none (model.class_token)")
    check_plain(model, "MAE's layout", class_token=True)
    encoder = dict(whole.weights["encoder"])
    state = {
        "cls_token": encoder.pop(TOKENS)[None],
        "pos_embed": as_stored(sincos_positions(model.grid, model.dim), class_token=True),
        **encoder,
    }
    if decoder := whole.weights.get("decoder"):
        width = len(decoder["embed.weight"])
        names = {ours: theirs for theirs, ours in DECODER.items()}
        state["decoder_pos_embed"] = as_stored(sincos_positions(model.grid, width), class_token=True)
        for name, value in decoder.items():
            stem, dot, rest = name.partition(".")
            state[names[stem] + dot + rest] = pixels(value, (model.channels, -1)) if stem == "proj" else value
    return state


def write(file: Path, whole: Imported) -> None:
    """In the released layout. What it has no place for lies beside `model`. Raises UserError for what it cannot carry."""
    about: dict[str, Any] = {
        "heads": whole.model.n_heads,
        "image_size": list(whole.model.image_size),
        "mean": list(whole.mean),
        "std": list(whole.std),
        "hidden": whole.hidden,
    }
    if whole.mae:
        about |= {"decoder_heads": whole.mae.decoder_heads, "normalised": whole.mae.normalised}
    torch.save({"model": stored(whole), OURS: about}, file)

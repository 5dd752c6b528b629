"""Hugging Face's `IJepaModel`, in and out: the encoder alone, with an image processor that does our preprocessing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    without_prefix,
)
from openjepa.errors import UserError, first_line, needs
from openjepa.models.encoder import Encoder

# Ours to theirs, in the order of transformers 5 and 4; q, k and v are apart there.
TOP = {
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
}
BLOCK = {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
}
QKV = (("attention.q_proj", "attention.k_proj", "attention.v_proj"),
       ("attention.attention.query", "attention.attention.key", "attention.attention.value"))  # fmt: skip
LAYERS = ("layers", "encoder.layer")
SAID = {"hidden_size": "dim", "num_hidden_layers": "n_blocks", "patch_size": "patch_size", "num_channels": "channels"}


def transformers() -> Any:
    """The library, or one line that says which extra brings it."""
    with needs("hf"):
        import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def write(folder: Path, encoder: Encoder) -> None:
    """`AutoModel.from_pretrained(folder)` and `AutoImageProcessor.from_pretrained(folder)`. Raises UserError."""
    library, config = transformers(), encoder.vit.config
    check_plain(config, "Hugging Face's IJepaModel")
    height, width = config.image_size
    hidden = encoder.vit.state_dict()["blocks.0.mlp.fc1.weight"].shape[0]
    model = library.IJepaModel(
        library.IJepaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_blocks,
            num_attention_heads=config.n_heads,
            intermediate_size=hidden,
            image_size=height if height == width else [height, width],
            patch_size=config.patch_size,
            num_channels=config.channels,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **{NETWORK: encoder.network},
        ),
        add_pooling_layer=False,
    )
    state = with_positions(encoder.vit)
    model.load_state_dict(to_theirs(state, model.state_dict()))
    model.save_pretrained(folder)
    processor(encoder).save_pretrained(folder)


def processor(encoder: Encoder) -> Any:
    """Shorter side to the model's size, central square, [0, 1], normalised: what evaluation does here.

    A model that is not square gets a processor that resizes to its size without a crop, as the library has no other.
    """
    (height, width), mean, std = encoder.vit.config.image_size, *encoder.statistics()
    bilinear, library = 2, transformers()
    rgb = encoder.vit.config.channels == 3
    common = {"image_mean": list(mean), "image_std": list(std), "resample": bilinear, "do_convert_rgb": rgb}
    if height == width:
        side = {"height": height, "width": width}
        return library.CLIPImageProcessor(size={"shortest_edge": height}, crop_size=side, **common)
    return library.ViTImageProcessor(size={"height": height, "width": width}, **common)


def download(name: str) -> Path:
    """A model of the hub, in the hub's own cache. Raises UserError."""
    with needs("hf"):
        import huggingface_hub
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        kept = ["*.json", "*.safetensors", "pytorch_model*.bin"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=kept))
    except Exception as error:  # the hub's, the network's and the disk's errors share no class
        raise UserError(f"hf:{name} cannot be fetched ({first_line(error)})") from error


def read(config: Mapping[str, Any], processor: Mapping[str, Any], state: State, told: Told, where: str) -> Imported:
    """An `IJepaModel` from what its folder holds: config.json, preprocessor_config.json and the weights.

    Raises UserError for what computes something else than an I-JEPA's encoder, and for weights that are missing or extra.
    """
    computes = {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True}
    prepares = {"do_rescale": True, "rescale_factor": 1 / 255}
    for said, expectations in ((config, computes), (processor, prepares)):
        for name, expected in expectations.items():
            if said.get(name, expected) != expected:
                raise UserError(f"{where} has {name} {said[name]!r}: {expected!r} is what is done here")
    size, heads = config["image_size"], config["num_attention_heads"]
    if told.heads not in (None, heads):
        raise UserError(f"{where} says that it has {heads} heads, not {told.heads}")
    known = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    own = to_ours(without_prefix(state, "ijepa.", where), where)
    vit, own = encoder_alone(own, Told(heads=heads, image_size=told.image_size or known), where)
    agrees(config, vit, SAID, where)
    if processor.get("do_normalize", True):
        mean, std = given_statistics(processor.get("image_mean"), processor.get("image_std"), vit.channels, where)
    else:
        mean, std = (0.0,) * vit.channels, (1.0,) * vit.channels
    return Imported(vit, {config.get(NETWORK, "target_encoder"): own}, mean=mean, std=std)


def to_theirs(state: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> State:
    """Our state dict (with `pos_embed`) under the names that this version of the library uses."""

    def pick(*names: str) -> str:
        return next(name for name in names if name in theirs)

    out: State = {}
    for name, value in state.items():
        if not name.startswith("blocks."):
            stem, ending = (name, "") if name == "pos_embed" else split(name)
            out[pick(*(t + ending for t in TOP[stem]))] = value
            continue
        _, number, rest = name.split(".", 2)
        stem, ending = split(rest)
        if stem == "attn.qkv":
            for part, tensor in enumerate(value.chunk(3)):
                names = (f"{layers}.{number}.{qkv[part]}{ending}" for layers in LAYERS for qkv in QKV)
                out[pick(*names)] = tensor.clone()
        else:
            out[pick(*(f"{layers}.{number}.{t}{ending}" for layers in LAYERS for t in BLOCK[stem]))] = value
    return out


def to_ours(state: Mapping[str, Tensor], where: str) -> State:
    """Their state dict under our names, q, k and v joined. Raises UserError naming what is left over."""
    left = dict(state)

    def take(*names: str) -> Tensor:
        for name in names:
            if name in left:
                return left.pop(name)
        raise UserError(f"{where} has no '{names[0]}'")

    out: State = {}
    for stem, names in TOP.items():
        for ending in ("",) if stem == "pos_embed" else (".weight", ".bias"):
            out[stem + ending] = take(*(t + ending for t in names))
    numbers = {
        int(n.removeprefix(layers + ".").split(".")[0]) for layers in LAYERS for n in left if n.startswith(layers)
    }
    for number in sorted(numbers):
        for ending in (".weight", ".bias"):
            for ours, theirs in BLOCK.items():
                out[f"blocks.{number}.{ours}{ending}"] = take(
                    *(f"{a}.{number}.{t}{ending}" for a in LAYERS for t in theirs)
                )
            parts = [take(*(f"{a}.{number}.{qkv[i]}{ending}" for a in LAYERS for qkv in QKV)) for i in range(3)]
            out[f"blocks.{number}.attn.qkv{ending}"] = torch.cat(parts)
    if left:
        raise UserError(f"{where} has unknown {', '.join(sorted(left)[:3])}")
    return out


def split(name: str) -> tuple[str, str]:
    """'attn.qkv.weight' to ('attn.qkv', '.weight')."""
    stem, _, ending = name.rpartition(".")
    return stem, "." + ending

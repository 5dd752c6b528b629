"""Hugging Face's `IJepaModel` and `ViTMAEForPreTraining`, in and out, with an image processor that does our preprocessing.

Of I-JEPA the encoder alone; of MAE the decoder, too, where there is one (`ViTMAEModel` has none).
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from openjepa.convert import mae
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
from openjepa.methods.mae import MAEConfig
from openjepa.models.encoder import Encoder
from openjepa.models.vit import ViTConfig

# Ours to theirs, in the order of transformers 5 and 4; q, k and v are apart there.
TOP = {
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
}
MAE = {"cls_token": ("embeddings.cls_token",)}
DECODER = {name: (f"decoder.{name}",) for name in mae.DECODER if name != "decoder_blocks"}
BLOCK = {
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
}
QKV = (("attention.q_proj", "attention.k_proj", "attention.v_proj"),
       ("attention.attention.query", "attention.attention.key", "attention.attention.value"))  # fmt: skip
LAYERS = {
    "blocks": ("layers", "encoder.layer"),
    "decoder_blocks": ("decoder.decoder_encoder.layer", "decoder.decoder_layers"),
}
BARE = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")  # have no .weight and .bias
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
    state, (mean, std) = with_positions(encoder.vit), encoder.statistics()
    if config.class_token and encoder.network == "encoder":
        write_vit_mae(folder, config, None, state, mean, std)
        return
    check_plain(config, "Hugging Face's IJepaModel")
    about = library.IJepaConfig(**architecture(config, state), **{NETWORK: encoder.network})
    model = library.IJepaModel(about, add_pooling_layer=False)
    model.load_state_dict(to_theirs(state, model.state_dict()))
    model.save_pretrained(folder)
    processor(config, mean, std).save_pretrained(folder)


def write_mae(folder: Path, whole: Imported) -> None:
    """`AutoModelForPreTraining.from_pretrained(folder)`, or AutoModel for the encoder alone. Raises UserError."""
    write_vit_mae(folder, whole.model, whole.mae, mae.stored(whole), whole.mean, whole.std, whole.hidden)


def write_vit_mae(folder: Path, config: ViTConfig, decoder: MAEConfig | None, state: State, mean: tuple[float, ...],
                  std: tuple[float, ...], hidden: float | None = None) -> None:  # fmt: skip
    """A `ViTMAEForPreTraining`, or a `ViTMAEModel` where there is no decoder. state: as the release has it."""
    library, values = transformers(), architecture(config, state)
    check_plain(config, "Hugging Face's ViTMAE", class_token=True)
    if config.image_size[0] != config.image_size[1]:
        raise UserError("Hugging Face's ViTMAE takes square images alone: export as timm, onnx or safetensors")
    if decoder:
        values |= {
            "decoder_hidden_size": decoder.decoder_width,
            "decoder_num_hidden_layers": decoder.decoder_depth,
            "decoder_num_attention_heads": decoder.decoder_heads,
            "decoder_intermediate_size": 4 * decoder.decoder_width,
            "norm_pix_loss": decoder.normalised,
        }
    values |= {"mask_ratio": hidden} if hidden else {}
    kind, prefix = ("ViTMAEForPreTraining", "vit.") if decoder else ("ViTMAEModel", "")
    library.ViTMAEConfig(**values, architectures=[kind], **{NETWORK: "encoder"}).save_pretrained(folder)
    named = {k if k.startswith("decoder.") else prefix + k: v.contiguous() for k, v in to_theirs(state).items()}
    save_file(
        named, folder / "model.safetensors", {"format": "pt"}
    )  # version 5 would save decoders under names of its own
    processor(config, mean, std).save_pretrained(folder)


def architecture(config: ViTConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What config.json says of an encoder. state: its weights."""
    height, width = config.image_size
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_blocks,
        "num_attention_heads": config.n_heads,
        "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def processor(config: ViTConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Shorter side to the model's size, central square, [0, 1], normalised: what evaluation does here.

    A model that is not square gets a processor that resizes to its size without a crop, as the library has no other.
    """
    (height, width), bilinear, library = config.image_size, 2, transformers()
    rgb = config.channels == 3
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
    told = understood(config, processor, told, where)
    own = to_ours(without_prefix(state, "ijepa.", where), TOP, ("blocks",), where)
    vit, own = encoder_alone(own, told, where)
    agrees(config, vit, SAID, where)
    mean, std = statistics(processor, vit.channels, where)
    return Imported(vit, {config.get(NETWORK, "target_encoder"): own}, mean=mean, std=std)


def read_mae(config: Mapping[str, Any], processor: Mapping[str, Any], state: State, told: Told, where: str) -> Imported:
    """A `ViTMAEModel` or `ViTMAEForPreTraining` as above. Raises UserError."""
    eps = (1e-6, 1e-12)  # what they were trained with, and what the library's own files say
    told = understood(config, processor, told, where, eps)
    told = replace(told, decoder_heads=config["decoder_num_attention_heads"])
    whole = any(name.startswith("decoder.") for name in state)
    stems, layers = (TOP | MAE | DECODER, tuple(LAYERS)) if whole else (TOP | MAE, ("blocks",))
    own = to_ours(without_prefix(state, "vit.", where), stems, layers, where)
    mean, std = statistics(processor, config["num_channels"], where)
    found = mae.read_state(own, told, where, bool(config.get("norm_pix_loss", False)), mean, std)
    agrees(config, found.model, SAID, where)
    if found.mae and config["decoder_num_hidden_layers"] != found.mae.decoder_depth:
        raise UserError(
            f"{where} says decoder_num_hidden_layers {config['decoder_num_hidden_layers']}, and its weights have "
            f"{found.mae.decoder_depth}: is it whole?"
        )
    return replace(found, hidden=config.get("mask_ratio"))


def understood(config: Mapping[str, Any], processor: Mapping[str, Any], told: Told, where: str,
               eps: tuple[float, ...] = (1e-6,)) -> Told:  # fmt: skip
    """Heads and image size as config.json says them. Raises UserError for what computes or prepares images otherwise."""
    computes = {"layer_norm_eps": eps, "hidden_act": ("gelu",), "qkv_bias": (True,)}
    prepares = {"do_rescale": (True,), "rescale_factor": (1 / 255,)}
    for said, expectations in ((config, computes), (processor, prepares)):
        for name, expected in expectations.items():
            if said.get(name, expected[0]) not in expected:
                raise UserError(f"{where} has {name} {said[name]!r}: {expected[0]!r} is what is done here")
    size, heads = config["image_size"], config["num_attention_heads"]
    if told.heads not in (None, heads):
        raise UserError(f"{where} says that it has {heads} heads, not {told.heads}")
    known = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return Told(heads=heads, image_size=told.image_size or known)


def statistics(processor: Mapping[str, Any], channels: int, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and deviation that a processor normalises images with."""
    if processor.get("do_normalize", True):
        return given_statistics(processor.get("image_mean"), processor.get("image_std"), channels, where)
    return (0.0,) * channels, (1.0,) * channels


def to_theirs(state: Mapping[str, Tensor], theirs: Container[str] | None = None) -> State:
    """Our state dict (with `pos_embed`; a MAE's under the release's names) under theirs.

    theirs: what this version of the library uses; without, it is the oldest names, which every version reads.
    """

    def pick(*names: str) -> str:
        return names[-1] if theirs is None else next(name for name in names if name in theirs)

    out: State = {}
    for name, value in state.items():
        if name.partition(".")[0] not in LAYERS:
            stem, ending = (name, "") if name in BARE else split(name)
            out[pick(*(t + ending for t in (TOP | MAE | DECODER)[stem]))] = value
            continue
        kind, number, rest = name.split(".", 2)
        stem, ending = split(rest)
        if stem == "attn.qkv":
            for part, tensor in enumerate(value.chunk(3)):
                names = (f"{layers}.{number}.{qkv[part]}{ending}" for layers in LAYERS[kind] for qkv in QKV)
                out[pick(*names)] = tensor.clone()
        else:
            out[pick(*(f"{layers}.{number}.{t}{ending}" for layers in LAYERS[kind] for t in BLOCK[stem]))] = value
    return out


def to_ours(state: Mapping[str, Tensor], top: Mapping[str, tuple[str, ...]], kinds: Sequence[str], where: str) -> State:
    """Their state dict under our names (a MAE's under the release's), q, k and v joined.

    top: what is there beside the blocks; kinds: of blocks. Raises UserError naming what is left over.
    """
    left = dict(state)

    def take(*names: str) -> Tensor:
        for name in names:
            if name in left:
                return left.pop(name)
        raise UserError(f"{where} has no '{names[0]}'")

    out: State = {}
    for stem, names in top.items():
        for ending in ("",) if stem in BARE else (".weight", ".bias"):
            out[stem + ending] = take(*(t + ending for t in names))
    for kind in kinds:
        stacks = LAYERS[kind]
        depth = {int(n.removeprefix(f"{a}.").split(".")[0]) for a in stacks for n in left if n.startswith(f"{a}.")}
        for number in sorted(depth):
            for ending in (".weight", ".bias"):
                for ours, theirs in BLOCK.items():
                    names = tuple(f"{a}.{number}.{t}{ending}" for a in stacks for t in theirs)
                    out[f"{kind}.{number}.{ours}{ending}"] = take(*names)
                parts = [take(*(f"{a}.{number}.{qkv[i]}{ending}" for a in stacks for qkv in QKV)) for i in range(3)]
                out[f"{kind}.{number}.attn.qkv{ending}"] = torch.cat(parts)
    if left:
        raise UserError(f"{where} has unknown {', '.join(sorted(left)[:3])}")
    return out


def split(name: str) -> tuple[str, str]:
    """'attn.qkv.weight' to ('attn.qkv', '.weight')."""
    stem, _, ending = name.rpartition(".")
    return stem, "." + ending

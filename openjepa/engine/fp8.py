"""`precision: fp8`: the linear layers of transformer blocks multiply in 8 bits, everything else in bfloat16."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from openjepa.errors import UserError, needs
from openjepa.methods.method import Method

CAPABILITY = (8, 9)  # the first GPUs whose tensor cores have it: Ada, and Hopper after them
SIDE = 16  # what the sizes of an fp8 matrix product must be multiples of


def has_fp8(device: torch.device) -> bool:
    """Whether hardware and libraries multiply in 8 bits."""
    return device.type == "cuda" and capable(device) and find_spec("torchao") is not None


def capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def use_fp8(method: Method, device: torch.device) -> str:
    """Swap torchao's linear layers in, in place: values and weights in e4m3, gradients in e5m2, a scale for each tensor.

    Weights keep their names and stay float32, for the optimiser and the moving average. Layers whose sizes do not fit stay as
    they are, and queries, keys and values of a predictor's final block, which takes its weights apart. On a CPU it is emulated,
    which shows its accuracy and nothing else: values are rounded to 8 bits and multiplied in the precision they had.
    Returns what to tell. Raises UserError for GPUs that have no fp8, for methods without a layer that fits, and where
    torchao is missing.
    """
    if device.type == "cuda" and not capable(device):
        raise UserError(f"precision fp8: {torch.cuda.get_device_name(device)} has no fp8 matrix products, take bf16")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # it warns of how torchao uses torch
    with needs("fp8"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = Float8LinearConfig(emulate=device.type != "cuda", pad_inner_dim=True)

    layers = fitting = 0
    for network in method.networks().values():
        blocks: Any = network.blocks
        whole = {id(block) for block in network.repeated()}  # type: ignore[operator]
        apart = {id(block.attn.qkv) for block in blocks if id(block) not in whole}
        linear = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
        fits = {id(m) for m in linear if not (m.in_features % SIDE or m.out_features % SIDE or id(m) in apart)}
        layers, fitting = layers + len(linear), fitting + len(fits)
        convert_to_float8_training(blocks, module_filter_fn=lambda m, _, fits=fits: id(m) in fits, config=config)
    if not fitting:
        raise UserError(f"precision fp8: no linear layer of a block has sizes that are multiples of {SIDE}, take bf16")
    emulated = "" if device.type == "cuda" else ", emulated: slower, to see what it costs in accuracy"
    return f"fp8: {fitting} of {layers} linear layers of blocks{emulated}"

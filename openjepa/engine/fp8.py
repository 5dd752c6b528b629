"""`precision: fp8`: the linear layers of transformer blocks multiply in 8 bits, everything else in bfloat16."""

from __future__ import annotations

from importlib.util import find_spec

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


def use_fp8(method: Method, device: torch.device) -> None:
    """Swap torchao's linear layers in, in place: values and weights in e4m3, gradients in e5m2, a scale for each tensor.

    Weights keep their names and stay float32, for the optimiser and the moving average. On a CPU it is emulated, which shows
    its accuracy and nothing else: values are rounded to 8 bits and multiplied in the precision they had. Raises UserError
    for GPUs that have no fp8, methods without such blocks, and where torchao is missing.
    """
    if device.type == "cuda" and not capable(device):
        raise UserError(f"precision fp8: {torch.cuda.get_device_name(device)} has no fp8 matrix products, take bf16")
    with needs("fp8"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    if not (networks := method.networks()):
        raise UserError("precision fp8 is for transformer blocks, and this method has none: take bf16")
    config = Float8LinearConfig(emulate=device.type != "cuda", pad_inner_dim=True)

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % SIDE == 0 and module.out_features % SIDE == 0

    for network in networks.values():
        convert_to_float8_training(network.blocks, module_filter_fn=fits, config=config)

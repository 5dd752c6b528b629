"""What the engine asks of a method: a module that learns from batches, of which one encoder is kept.

A new method is one file beside this one and an entry in recipes/methods.py: docs/adding-a-method.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from openjepa.models.layers import DropPath, Recompute, compile_blocks, follow, recompute_blocks
from openjepa.models.vit import ViT


class Method(nn.Module):
    """Networks that learn, and those that follow them by exponential moving average."""

    follows: ClassVar[Mapping[str, str]] = {}  # a network that learns nothing itself: the one that it follows
    task: ClassVar[str] = (
        "The grey patches are hidden, the coloured ones asked for."  # below the masks of a run's report
    )
    represents: ClassVar[bool] = True  # training is for an encoder, whose features can be watched and asked for
    encoder: ViT

    @classmethod
    def product_name(cls) -> str:
        """The network that training is for: the encoder, or the one that follows it."""
        return cls.encoders()[-1]

    @classmethod
    def encoders(cls) -> tuple[str, ...]:
        """The encoder, and what follows it."""
        return "encoder", *(slow for slow, fast in cls.follows.items() if fast == "encoder")

    @property
    def product(self) -> ViT:
        return getattr(self, self.product_name())

    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        for slow in self.follows:
            getattr(self, slow).eval()
        return self

    def networks(self) -> dict[str, nn.Module]:
        """Those made of transformer blocks."""
        return {name: network for name, network in self.named_children() if hasattr(network, "blocks")}

    def compile_blocks(self) -> None:
        """Compile what repeats."""
        compile_blocks(*(network.repeated() for network in self.networks().values()))  # type: ignore[operator]

    def recompute_blocks(self, how: Recompute) -> None:
        """Trade time for memory in what has a backward pass."""
        learning = {name: network for name, network in self.networks().items() if name not in self.follows}
        recompute_blocks(how, *(network.blocks for network in learning.values()))  # type: ignore[arg-type]

    def share(self, number: int, of: int) -> None:
        """Which part of every batch is computed here, of how many."""
        for module in self.modules():
            if isinstance(module, DropPath):
                module.share = number, of

    # ------------------------------------------------------------ what the loop calls in a step, in this order

    def begin_step(self, epoch: float) -> None:
        """Before the batch. epoch: of the run so far, with its fraction."""

    # forward(images, masks, small=None) returns `loss` (scalar), `losses` [B], each image's own without gradient, and
    # perhaps `means`, which after_step gets averaged over all of the step's images.

    def before_update(self, epoch: float) -> None:
        """When all gradients are there."""

    @torch.no_grad()
    def after_step(self, momentum: float, learned: float | Tensor = 1.0, means: Tensor | None = None) -> None:
        """What follows moves. learned: 0 after a step that changed nothing."""
        for slow, fast in self.follows.items():
            follow(getattr(self, slow), getattr(self, fast), (1.0 - momentum) * learned)

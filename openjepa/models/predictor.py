"""The narrow transformer that predicts target features from context features.

I-JEPA, section 3 "Prediction" and appendix A. B images, C contexts, K context patches, M blocks of T patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openjepa.errors import UserError
from openjepa.models.layers import Block, Layout, Ragged, Shared, initialise, sincos_positions
from openjepa.models.vit import ViTConfig


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The predictor. It has as many heads as the encoder unless told otherwise."""

    width: int = 384
    depth: int = 6
    heads: int | None = None
    context: Literal["each", "shared"] = "each"  # its tokens computed anew for each block (the paper), or once for all

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4:
            raise UserError(f"predictor.width is {self.width}: positions need a multiple of 4")
        if self.depth < 1:
            raise UserError(f"predictor.depth is {self.depth}: it must be at least 1")
        if self.heads is not None and (self.heads < 1 or self.width % self.heads):
            raise UserError(f"predictor.width {self.width} must be divisible by predictor.heads ({self.heads})")


class Predictor(nn.Module):
    """Context tokens and one block's mask tokens in, that block's features out; one pass for each block.

    `shared` context tokens see no mask tokens, so that one pass serves all blocks: K + M*T tokens instead of M*(K + T).
    """

    def __init__(self, config: PredictorConfig, encoder: ViTConfig, out: int | None = None) -> None:
        """out: the width of what is predicted, the encoder's own unless told."""
        super().__init__()
        self.shared = config.context == "shared"
        heads = config.heads or encoder.n_heads
        if config.width % heads:
            raise UserError(
                f"predictor.width {config.width} is not divisible by the encoder's {heads} heads: set predictor.heads"
            )
        self.embed = nn.Linear(encoder.dim, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("positions", sincos_positions(encoder.grid, config.width), persistent=False)
        self.blocks = nn.ModuleList(Block(config.width, heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.proj = nn.Linear(config.width, out or encoder.dim)
        initialise(self, self.blocks, encoder.init, encoder.depth_scaled_init)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, visible: Tensor, targets: Tensor, ragged: Ragged | None = None) -> Tensor:
        """Predict the features of every block from one context.

        context: [B, K, D], or [total, D] with `ragged`; visible: int64 [B, K]; targets: int64 [B, M, T]. More context tokens
        than are visible begin with some that have no place, such as a class token. Returns [B, M, T, out].
        """
        b, m, t = targets.shape
        k = visible.shape[1] if ragged is not None else context.shape[1]
        positions = self.get_buffer("positions")
        seen = self.embed(context)  # projected once, then shared by the M passes
        seen = ragged.pad(seen) if ragged is not None else seen
        places = positions[visible]
        if k > visible.shape[1]:
            places = F.pad(places, (0, 0, k - visible.shape[1], 0))
        seen = seen + places  # [B, K, P]
        asked = (self.mask_token + positions[targets]).to(seen.dtype)  # [B, M, T, P]
        layout: Layout = None
        if self.shared:
            x, layout, last = torch.cat([seen, asked.flatten(1, 2)], dim=1), Shared(k, m), m * t  # [B, K + M*T, P]
        else:
            x, last = torch.cat([seen[:, None].expand(-1, m, -1, -1), asked], dim=2).flatten(0, 1), t  # [B*M, K + T, P]
        if ragged is not None:
            layout = ragged = with_targets(ragged, m, t)
            x = ragged.pack(x)
        *blocks, final = self.blocks
        for block in blocks:
            x = block(x, layout)
        x = final(x, layout, last) if ragged is None else ragged.pad(final(x, ragged))[:, k:]  # the context has served
        predicted: Tensor = self.proj(self.norm(x))
        return predicted.reshape(b, m, t, -1)

    def repeated(self) -> list[nn.Module]:
        """The blocks that are of one kind, for torch.compile: the final one is asked for targets alone."""
        return list(self.blocks)[:-1]


def with_targets(ragged: Ragged, m: int, t: int) -> Ragged:
    """The layout of m sequences for each context, each with t mask tokens at its end."""
    mask = torch.cat([ragged.mask, ragged.mask.new_ones(len(ragged.mask), t)], dim=1)
    return Ragged(mask.repeat_interleave(m, dim=0), m * (ragged.total + len(ragged.mask) * t))

"""The Vision Transformer that encodes images: all patches for the target encoder, the visible ones for the context.

Dosovitskiy et al., 2021, with the choices of I-JEPA (appendix A): no class token, fixed 2-D sine-cosine positions.
B images, N = H*W patches, K visible patches, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from openjepa.errors import UserError, nearest
from openjepa.models.layers import (
    Block,
    Init,
    PatchEmbed,
    Ragged,
    initialise,
    interpolate_positions,
    sincos_positions,
)

# width, depth, heads, mlp ratio
SIZES: dict[str, tuple[int, int, int, float]] = {
    "Ti": (192, 12, 3, 4.0),
    "S": (384, 12, 6, 4.0),
    "B": (768, 12, 12, 4.0),
    "L": (1024, 24, 16, 4.0),
    "H": (1280, 32, 16, 4.0),
    "G": (1408, 40, 16, 48 / 11),
}


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The encoder. `size` names width, depth, heads and MLP ratio; each can be set apart."""

    size: str = "B"
    image_size: tuple[int, int] = (224, 224)  # height, width of the images it trains on, in pixels
    patch_size: int = 16  # pixels
    channels: int = 3
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    class_token: bool = False
    registers: int = 0  # extra learned tokens without a position (Darcet et al., 2024)
    drop_path: float = 0.0  # rate at the last block, rising linearly from 0
    layer_scale: float | None = None  # initial value, or none
    qk_norm: bool = False
    init: Init = "normal"  # of encoder and predictor: truncated at 0.02, or Xavier's, which MAE's always are
    depth_scaled_init: bool = False

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(
                f"model.size '{self.size}' is unknown: one of {', '.join(SIZES)}{nearest(self.size, SIZES)}"
            )
        for name, value in self.implied().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be above 0")
        height, width = self.image_size
        if min(height, width) < 1:
            raise UserError(f"model.image_size is {height}x{width}: both sides must be at least 1")
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"model.patch_size {self.patch_size} does not divide the image of {height}x{width} pixels: "
                f"{height} = {height // max(1, self.patch_size)} x {self.patch_size} + {height % max(1, self.patch_size)}"
            )
        if self.dim % self.n_heads or self.dim % 4:
            raise UserError(f"model.width {self.dim} must be divisible by model.heads ({self.n_heads}) and by 4")
        if self.channels < 1 or self.registers < 0 or not 0 <= self.drop_path < 1:
            raise UserError("model: channels must be at least 1, registers at least 0, drop_path in [0, 1)")

    def implied(self) -> dict[str, float]:
        """The width, depth, heads and mlp_ratio that the size stands for."""
        return dict(zip(("width", "depth", "heads", "mlp_ratio"), SIZES[self.size], strict=True))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def dim(self) -> int:
        assert self.width is not None
        return self.width

    @property
    def n_blocks(self) -> int:
        assert self.depth is not None
        return self.depth

    @property
    def n_heads(self) -> int:
        assert self.heads is not None
        return self.heads


Tokens = Literal["patches", "class"]  # what is asked for features


class ViT(nn.Module):
    """images [B, C, H, W] to patch features [B, N, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, depth = config.dim, config.n_blocks
        self.patch_embed = PatchEmbed(config.patch_size, config.channels, dim)
        self.prefix = int(config.class_token) + config.registers  # tokens before the patches
        self.prefix_tokens = nn.Parameter(torch.zeros(self.prefix, dim)) if self.prefix else None
        self.register_buffer("positions", sincos_positions(config.grid, dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.n_heads,
                config.mlp_ratio or 4.0,
                drop_path=config.drop_path * i / max(1, depth - 1),
                layer_scale=config.layer_scale,
                qk_norm=config.qk_norm,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        initialise(self, self.blocks, config.init, config.depth_scaled_init)
        if self.prefix_tokens is not None:
            nn.init.normal_(self.prefix_tokens, std=0.02)

    def forward(self, images: Tensor, visible: Tensor | None = None, ragged: Ragged | None = None) -> Tensor:
        """Encode all patches, or the visible ones alone.

        images: [B, C, H, W], sides divisible by the patch size. visible: int64 [B, K] patch indices.
        ragged: which of the [B, K] are real; tokens are then packed throughout.
        Returns [B, N or K, D] after the final norm (patches alone, no prefix tokens), or [total, D] if ragged.
        """
        x = self.tokens(images, visible, ragged)
        return x if ragged is not None else x[:, self.prefix :]

    def tokens(self, images: Tensor, visible: Tensor | None = None, ragged: Ragged | None = None,
               hidden: tuple[Tensor, Tensor] | None = None) -> Tensor:  # fmt: skip
        """As forward, with the prefix tokens first. hidden: which patches, bool [B, N], a vector [D] stands in for."""
        x = self.embed(images, visible, hidden)
        if ragged is not None:
            if self.prefix:
                raise UserError("masking.context 'packed' does not go with class tokens or registers: use 'even'")
            x = ragged.pack(x)
        for block in self.blocks:
            x = block(x, ragged)
        return cast(Tensor, self.norm(x))

    def repeated(self) -> list[nn.Module]:
        """The blocks that are of one kind, for torch.compile."""
        return list(self.blocks)

    def intermediate(self, images: Tensor, layers: Sequence[int], tokens: Tokens = "patches") -> list[Tensor]:
        """The outputs of some blocks, each after the final norm (appendix A, linear evaluation).

        layers: block numbers from 0, or from -1 at the end. Returns a [B, N, D] for each, or [B, 1, D] of the class token.
        Raises ValueError for a block that is not there.
        """
        which = slice(0, 1) if tokens == "class" else slice(self.prefix, None)
        depth = len(self.blocks)
        if any(not -depth <= i < depth for i in layers):
            raise ValueError(f"layers {list(layers)}: this encoder has {depth}, 0 to {depth - 1}")
        wanted = [i % depth for i in layers]
        x = self.embed(images)
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in wanted:
                outputs[i] = self.norm(x)[:, which]
        return [outputs[i] for i in wanted]

    def last(self, layers: int) -> range:
        """The numbers of the last blocks, of all where there are fewer."""
        return range(max(0, len(self.blocks) - layers), len(self.blocks))

    def embed(
        self, images: Tensor, visible: Tensor | None = None, hidden: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Patch embeddings with positions, prefix tokens first. Returns [B, prefix + (N or K), D]."""
        positions = self.positions_for(images.shape[-2:])  # [N, D]
        x = self.patch_embed(images, visible)
        if hidden is not None:
            where, instead = hidden
            x = torch.where(where.unsqueeze(-1), instead.to(x.dtype), x)
        x = x + (positions if visible is None else positions[visible])
        if self.prefix_tokens is not None:
            x = torch.cat([self.prefix_tokens.expand(len(x), -1, -1), x], dim=1)
        return x

    def positions_for(self, size: torch.Size | tuple[int, int]) -> Tensor:
        """Positions for images of this size in pixels, interpolated where it is not the training size. [N, D]."""
        p = self.config.patch_size
        height, width = size
        if height % p or width % p or not height or not width:
            raise ValueError(f"images of {height}x{width} pixels do not divide into patches of {p}")
        positions = self.get_buffer("positions")
        return interpolate_positions(positions, self.config.grid, (height // p, width // p))

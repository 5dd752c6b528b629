"""What encoder and predictor are built from: attention, transformer block, positions, initialisation.

Names of parameters follow timm's ViT, which the released checkpoints share.
B sequences, N tokens each, D channels; `Ragged` holds sequences of different lengths laid end to end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openjepa.errors import UserError

# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Ragged:
    """How packed tokens [total, D] lie in a padded batch [S, L, D]."""

    mask: Tensor  # bool [S, L], True where a token is
    total: int  # number of True, known to the host so that no device need be asked

    def pack(self, padded: Tensor) -> Tensor:
        """[S, L, ...] to [total, ...]."""
        return padded.flatten(0, 1).index_select(0, self._where())

    def pad(self, packed: Tensor) -> Tensor:
        """[total, ...] to [S, L, ...], zero where no token is."""
        padded = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
        return padded.index_copy(0, self._where(), packed).view(*self.mask.shape, *packed.shape[1:])

    def _where(self) -> Tensor:
        return torch.nonzero_static(self.mask.flatten(), size=self.total)[:, 0]


@dataclass(frozen=True)
class Shared:
    """How a sequence [B, K + M*T, D] is read: K context tokens see each other, the T tokens of a block see them and their own."""

    context: int  # K
    blocks: int  # M


Layout = Ragged | Shared | None  # who attends to whom; None: all tokens of a sequence to all


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout = None) -> Tensor:
    """softmax(q k' / sqrt(d)) v by the fastest exact kernel for the device, dtype and length.

    q, k, v: [B, heads, N, d], returned alike; or, Ragged, [total, heads, d]. q may be of the last tokens alone, unless Ragged.
    The choice is measured by `openjepa bench attention` (docs/performance.md).
    """
    if isinstance(layout, Ragged):
        return ragged_attention(q, k, v, layout)
    if isinstance(layout, Shared):
        return shared_attention(q, k, v, layout)
    if q.device.type == "cpu" and short(q):
        return plain_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def short(q: Tensor) -> bool:
    """Whether plain matrix products beat torch's fused attention on a CPU, forward and backward."""
    return q.dtype == torch.bfloat16 and q.shape[-2] < 512


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula as it stands. mask: bool, broadcast to [B, heads, N, N], False where a key is hidden."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return cast(Tensor, scores.softmax(-1).to(v.dtype) @ v)


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """Variable-length flash attention where the device has it, padded and masked attention elsewhere."""
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return flash_attention(q, k, v, ragged)
    q, k, v = (ragged.pad(t).transpose(1, 2) for t in (q, k, v))  # [S, heads, L, d]
    mask = ragged.mask[:, None, None, :]
    if q.device.type == "cpu" and short(q):
        out = plain_attention(q, k, v, mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return ragged.pack(out.transpose(1, 2))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
    """Variable-length: sequences end to end, and where each of them ends."""
    from torch.nn.attention.varlen import varlen_attn

    ends = F.pad(ragged.mask.sum(-1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    longest = ragged.mask.shape[1]
    return cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest))


def shared_attention(q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> Tensor:
    """q: [B, heads, K + M*T, d], or [B, heads, M*T, d] of the blocks alone, their keys and values whole. Returned alike."""
    context, m = shared.context, shared.blocks
    seen = q.shape[2] - (k.shape[2] - context)  # queries that are the context's

    def by_block(x: Tensor) -> Tensor:
        """[B, heads, M*T, d] to [B*M, heads, T, d]."""
        return x.unflatten(2, (m, -1)).transpose(1, 2).flatten(0, 1)

    def with_context(x: Tensor) -> Tensor:
        """[B, heads, K + M*T, d] to [B*M, heads, K + T, d]."""
        copies = x[:, :, :context].unsqueeze(1).expand(-1, m, -1, -1, -1).flatten(0, 1)
        return torch.cat([copies, by_block(x[:, :, context:])], dim=2)

    asked = attention(by_block(q[:, :, seen:]), with_context(k), with_context(v))
    asked = asked.unflatten(0, (-1, m)).transpose(1, 2).flatten(2, 3)
    if not seen:
        return asked
    return torch.cat([attention(q[:, :, :seen], k[:, :, :context], v[:, :, :context]), asked], dim=2)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout = None, last: int | None = None) -> Tensor:
        """x: [B, N, D], or [total, D] if Ragged. Returned alike; or, not Ragged, for the last tokens alone, [B, last, D]."""
        if last is not None:
            return self.of_last(x, layout, last)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if isinstance(layout, Ragged):
            q, k, v = qkv.unbind(1)  # each [total, heads, d]
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        out = attention(self.q_norm(q), self.k_norm(k), v, layout)
        if not isinstance(layout, Ragged):
            out = out.transpose(1, 2)
        return cast(Tensor, self.proj(out.flatten(-2)))

    def weights(self, x: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d)), which the fused kernels never show. x: [B, N, D]. Returns [B, heads, N, N], rows sum to 1."""
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        return cast(Tensor, (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1))

    def of_last(self, x: Tensor, layout: Layout, last: int) -> Tensor:
        """Queries of the last tokens, keys and values of all."""
        assert not isinstance(layout, Ragged)
        d = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, -last:], weight[:d], bias[:d]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = F.linear(x, weight[d:], bias[d:]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(self.q_norm(q), self.k_norm(k), v, layout)
        return cast(Tensor, self.proj(out.transpose(1, 2).flatten(-2)))


# ---------------------------------------------------------------- transformer block


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al., 2021)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Drop a whole branch for some of the sequences while training (Huang et al., 2016).

    share: which part of the sequences of all processes is here, (number, of how many); all draw for all, so that their number
    changes nothing.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.share = rate, (0, 1)

    def forward(self, x: Tensor, layout: Layout = None) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        sequences = len(layout.mask) if isinstance(layout, Ragged) else len(x)
        number, of = self.share
        drawn = torch.rand(of * sequences, 1, 1, device=x.device)[number * sequences : (number + 1) * sequences]
        keep = (drawn >= self.rate) / (1 - self.rate)
        if isinstance(layout, Ragged):
            keep = layout.pack(keep.expand(-1, layout.mask.shape[1], 1))
        return x * keep.to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: Layout = None, last: int | None = None) -> Tensor:
        """x: [B, N, D], or [total, D] if Ragged. Returned alike; or, not Ragged, for the last tokens alone, [B, last, D]."""
        kept = x if last is None else x[:, -last:]
        x = kept + self.drop_path(self.ls1(self.attn(self.norm1(x), layout, last)), layout)
        return x + cast(Tensor, self.drop_path(self.ls2(self.mlp(self.norm2(x))), layout))


def compile_blocks(*stacks: Iterable[nn.Module]) -> None:
    """torch.compile transformer blocks, in place: one graph for a kind of block, shared by all depths and token counts.

    Masks change the token counts from step to step; nothing is compiled again for that. Raises UserError where torch finds no
    C++ compiler, which it needs for a GPU's kernels, too.
    """
    from torch._inductor import config

    names = [name for name in config.cpp.cxx if name]
    if not any(map(shutil.which, names)):
        raise UserError(
            f"to compile needs a C++ compiler ({' or '.join(names)}; CXX names another): install it, or do without"
        )
    for block in chain(*stacks):
        block.compile(dynamic=True)


Recompute = Literal["none", "selective", "full"]


def recompute_blocks(how: Recompute, *stacks: Iterable[nn.Module]) -> None:
    """Keep fewer activations of transformer blocks for backward, in place, and compute the others once more there.

    full: keeps a block's input alone; selective: its matrix products and attention too, which are the costly ones.
    """
    if how == "none":
        return
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = any(word in str(op) for word in ("mm", "attention", "attn"))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)

    def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(
            *args: Any, **kwargs: Any
        ) -> Tensor:  # a frame that torch.compile looks into, as it does not into checkpoint itself
            return checkpoint(forward, *args, **options, **kwargs)

        return call

    for block in chain(*stacks):
        block.forward = recomputed(block.forward)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, weight: float | Tensor) -> None:
    """slow += weight * (fast - slow), parameter by parameter in one fused operation; of shards, each its own.

    weight: a number, or a scalar on the parameters' device, which is not asked for its value.
    """
    ours, theirs = ([p.to_local() if hasattr(p, "to_local") else p for p in m.parameters()] for m in (slow, fast))
    torch._foreach_lerp_(ours, theirs, [weight] * len(ours) if isinstance(weight, Tensor) else weight)


# ---------------------------------------------------------------- patches and positions


class PatchEmbed(nn.Module):
    """A linear map of each patch, stored as the strided convolution it equals; hidden patches cost nothing."""

    def __init__(self, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """images [B, C, H, W]; visible int64 [B, K] or None for all. Returns [B, K or N, D]."""
        patches = patchify(images, self.proj.kernel_size[0])
        if visible is not None:
            patches = take(patches, visible)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] to [B, N, C * P * P], patches in row-major order, each in the order channel, row, column."""
    if images.ndim != 4:
        raise ValueError(f"images of shape {list(images.shape)}: give [batch, channels, height, width]")
    b, c, h, w = images.shape
    p = patch_size
    x = images.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // p) * (w // p), c * p * p)


def normalised_patches(images: Tensor, patch_size: int) -> Tensor:
    """Every patch less its mean, over its deviation (MAE, section 3). Returns float32 [B, N, C * P * P]."""
    patches = patchify(images, patch_size).float()
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D], index int64 [B, K]: the indexed tokens of each sequence, [B, K, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (MAE, appendix A.1), for any grid. Returns float32 [H*W, D].

    The first half of the channels encodes the column, the second half the row, as in the released code.
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(steps: int) -> Tensor:
        angles = torch.arange(steps, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [steps, D/2]

    rows, columns = grid
    column = encode(columns)[None].expand(rows, -1, -1)
    row = encode(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=2).reshape(rows * columns, width).float()


def interpolate_positions(positions: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of the whole grid of positions. [H*W, D] to [H'*W', D].

    The released code assumes a class token that its models lack and so shifts the grid; this does not.
    """
    if grid == new:
        return positions
    field = positions.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    field = F.interpolate(field, size=new, mode="bicubic", align_corners=False)
    return field.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(positions.dtype)


# ---------------------------------------------------------------- initialisation


Init = Literal["normal", "xavier"]


def initialise(model: nn.Module, blocks: nn.ModuleList, init: Init = "normal", depth_scaled: bool = False) -> None:
    """Every matrix anew, and zero for every bias.

    normal: truncated, deviation 0.02, what the released code really trains. xavier: uniform by the numbers of inputs and outputs,
    as MAE's; in narrow networks several times as large (docs/small-data.md). depth_scaled: the last matrix of each branch is
    divided by sqrt(2 * layer), which the released code does, too, and then overwrites.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if init == "xavier":
                nn.init.xavier_uniform_(module.weight.flatten(1))
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if depth_scaled:
        with torch.no_grad():
            for layer, block in enumerate(blocks, start=1):
                for linear in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]
                    linear.weight.div_((2.0 * layer) ** 0.5)  # type: ignore[union-attr, operator]

"""What patch features hold, as numbers: colours, attention, likeness, neighbours. Pictures of them are in `pictures`.

n images, N patches each, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openjepa.models.encoder import Encoder

AT_ONCE = 64  # images
BY_PLACE = 4  # images from which on features are centred at each place


@dataclass(frozen=True)
class Palette:
    """Three directions in feature space as red, green and blue: the same for all images that it paints.

    centre: [1 or N, D]; axes: [D, 3]; low, high: [3], where a colour is 0 and 1.
    """

    centre: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Palette:
        """The principal directions of some images' features [n, N, D].

        With a few images they are centred at each place, so that position itself has no colour; with fewer that would
        leave nothing, and the mean of all is taken.
        """
        n, patches, d = features.shape
        centre = features.mean(0) if n >= BY_PLACE else features.mean((0, 1))[None]
        centred = (features - centre).flatten(0, 1)
        if n * patches > 4 * d:  # the same directions from the covariance, whatever the number of patches
            axes = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :3]
        else:
            axes = torch.linalg.svd(centred, full_matrices=False)[2][:3].T
        projected = centred @ axes
        low, high = (projected[:: 1 + len(projected) // 2**20].quantile(q, dim=0) for q in (0.02, 0.98))
        return cls(centre, axes, low, high)

    def __call__(self, features: Tensor) -> np.ndarray:
        """[n, N, D] to colours [n, N, 3] in [0, 1]."""
        projected = (features - self.centre) @ self.axes
        return ((projected - self.low) / (self.high - self.low).clamp(min=1e-6)).clamp(0, 1).numpy()


@torch.no_grad()
def seen(encoder: Encoder, images: Tensor) -> Tensor:
    """The patch features of any number of images, float32 [n, N, D] on the CPU, wherever the encoder is."""
    return torch.cat([encoder(part.to(device_of(encoder))).float().cpu() for part in images.split(AT_ONCE)])


@torch.no_grad()
def pooled(encoder: Encoder, images: Tensor) -> Tensor:
    """The same, the mean of each image's patches, [n, D]."""
    return torch.cat([encoder(part.to(device_of(encoder))).float().mean(1).cpu() for part in images.split(AT_ONCE)])


def device_of(encoder: Encoder) -> torch.device:
    return encoder.vit.get_buffer("positions").device


@torch.no_grad()
def attention(encoder: Encoder, images: Tensor, block: int = -1) -> Tensor:
    """What the patches of one block attend to. images: as the encoder takes them, [n, channels, H, W].

    block: from 0, or from -1 at the end. Returns [n, heads, N, N]: row i is patch i's attention to all patches; what goes to
    class token and registers is left out, so that rows sum to 1 only without them. Raises ValueError for a block that is not there.
    """
    vit = encoder.vit
    depth = len(vit.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"block {block}: this encoder has {depth}, 0 to {depth - 1}")
    x = vit.embed(encoder.normalise(images.to(device_of(encoder))))
    for before in list(vit.blocks)[: block % depth]:
        x = before(x)
    chosen = vit.blocks[block]
    weights: Tensor = chosen.attn.weights(chosen.norm1(x))  # type: ignore[union-attr, operator]
    return weights[:, :, vit.prefix :, vit.prefix :].float().cpu()


def likeness(features: Tensor, image: int, patch: int, centre: Tensor | None = None) -> Tensor:
    """Cosine of one patch's features with those of all patches of all images. features: [n, N, D]. Returns [n, N].

    centre: what is taken off first, [D] or [N, D]: what all patches share says nothing of one.
    """
    unit = F.normalize(features if centre is None else features - centre, dim=-1)
    return unit @ unit[image, patch]


def nearest(queries: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest by cosine, best first. queries: [q, D], among: [m, D]. Returns cosines and places, [q, at most count]."""
    cosines = F.normalize(queries, dim=-1) @ F.normalize(among, dim=-1).T
    found = cosines.topk(min(count, len(among)), dim=1)
    return found.values, found.indices

"""Frozen features of whole images: what every protocol starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from openjepa.data.augment import centre_crop
from openjepa.data.decode import BadImage, decode
from openjepa.data.sources import Source
from openjepa.errors import UserError
from openjepa.models.vit import ViT

PIXELS = 64  # longer side of the raw-pixel control: a probe on more has more weights than data sets have images


class Images(Dataset[Tensor]):
    """Some images of a source, cropped centrally to the model's size, in order. Items: uint8 [channels, H, W]."""

    def __init__(
        self,
        source: Source,
        indices: Sequence[int] | np.ndarray,
        size: tuple[int, int],
        channels: int,
        skip_bad: bool = False,  # unreadable ones become black instead of an error: for rough online measures
    ) -> None:
        self.source, self.indices, self.size, self.channels, self.skip_bad = source, indices, size, channels, skip_bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tensor:
        index = int(self.indices[i])
        try:
            raw = self.source.read(index)
            pixels = decode(raw, lambda w, h: centre_crop(w, h, self.size), self.size, self.channels)
        except (BadImage, OSError) as error:
            if self.skip_bad:
                return torch.zeros(self.channels, *self.size, dtype=torch.uint8)
            raise UserError(f"unreadable image {self.source.name(index)} ({error}): remove it to evaluate") from error
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


@torch.no_grad()
def extract(
    encoder: ViT,
    images: Images,
    normalise: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[None]],
    layers: int = 4,
    batch_size: int = 256,
) -> Tensor:
    """Pooled patch features of the last `layers` blocks, each after the final norm (appendix A).

    Returns float32 [n, layers, D] on the CPU; the last layer is [:, -1].
    """
    device = encoder.patch_embed.proj.weight.device
    encoder.eval()
    parts = []
    for batch in DataLoader(images, batch_size=batch_size):
        with autocast():
            outputs = encoder.intermediate(normalise(batch.to(device)), encoder.last(layers))
        parts.append(torch.stack([o.float().mean(1) for o in outputs], dim=1).cpu())
    return torch.cat(parts)


def raw_pixels(images: Images) -> Tensor:
    """The control that any representation should beat: the image itself, 64 pixels a side at most. [n, 1, D]."""
    shrink = max(1.0, max(images.size) / PIXELS)
    height, width = (round(side / shrink) for side in images.size)
    images = Images(images.source, images.indices, (height, width), images.channels)
    return torch.stack([images[i].float().flatten() / 255 for i in range(len(images))])[:, None]

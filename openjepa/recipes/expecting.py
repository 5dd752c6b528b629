"""What a run expects behind a block, told without a decoder: the blocks of other images that are nearest to its prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openjepa.decoder.condition import Condition, Of
from openjepa.masking import Masks
from openjepa.methods.ijepa import IJEPA
from openjepa.recipes.exchange import Trained
from openjepa.see.patches import AT_ONCE, nearest

NUMBERS = 2**27  # that the features of a gallery may hold: half a gigabyte


@dataclass(frozen=True)
class Expected:
    """places: of the nearest in the gallery, best first; cosines: theirs. rank: of the block itself among all, 1 is the nearest.

    others: how many images were looked through.
    """

    places: list[int]
    cosines: list[float]
    rank: int
    others: int


class Gallery:
    """Patch features of some images by the target encoder, among which predictions are looked for.

    images: uint8 [n, C, H, W]. of: what is asked with, the prediction, or the block's own features where nothing predicts any.
    """

    def __init__(self, trained: Trained, images: Tensor) -> None:
        """The networks stay on the device where they are."""
        method = trained.method
        self.of: Of = "prediction" if isinstance(method, IJEPA) and method.loss.target == "encoder" else "block"
        self.condition, self.normalise = Condition(method, self.of), trained.normalise
        model = method.product.config
        self.images = images[: max(2, NUMBERS // (model.dim * model.grid[0] * model.grid[1]))]
        with torch.no_grad():
            self.features = torch.cat([self.seen(part) for part in self.images.split(AT_ONCE)])  # [n, N, D]

    def seen(self, images: Tensor) -> Tensor:
        """Levelled patch features [B, N, D], on the CPU."""
        return self.condition.levelled(self.condition.networks.product(self.input(images))).cpu()

    def input(self, images: Tensor) -> Tensor:
        device = next(self.condition.networks.parameters()).device
        return self.normalise.to(device)(images.to(device))

    @torch.no_grad()
    def nearest(self, image: Tensor, masks: Masks, count: int) -> Expected:
        """Blocks at the same place of other images, by cosine less what all of these share there.

        image: uint8 [C, H, W], which may be in the gallery itself; masks: of one.
        """
        x = self.input(image[None])
        asked = self.condition(x, masks.to(x.device)).cpu()
        block = masks.targets[0, 0]
        others = (self.images != image).flatten(1).any(1).nonzero()[:, 0]
        among = self.features[others][:, block].mean(1)
        own = self.seen(image[None])[:, block].mean(1)
        centre = among.mean(0)
        cosines, order = nearest(asked - centre, among - centre, len(among))
        true = torch.cosine_similarity(asked - centre, own - centre)
        rank = 1 + int((cosines[0] > true + 1e-6).sum())
        return Expected(others[order[0, :count]].tolist(), cosines[0, :count].tolist(), rank, len(others))

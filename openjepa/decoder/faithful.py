"""Whether samples are true to the representation that they were painted from (RCDM, section 4), beside controls.

n images that are painted, K samples of each, G images of a gallery, the first n of them these; C channels, D of the representation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from openjepa.decoder.paint import Sampling, paint
from openjepa.decoder.place import paste
from openjepa.decoder.rcdm import RCDM
from openjepa.evaluate.scores import Answer, resampled
from openjepa.masking import Grid, Masks, block_indices

BATCH = 256  # images that are encoded at once
POSITIONS = 8  # places of the block, shared out among the images
OWN, OTHER, MEAN, WRONG, RANDOM, REAL = (
    "its own",
    "another image's",
    "the mean",
    "wrong position",
    "random encoder's",
    "(the real pixels)",
)
METRICS = {  # all but the first two: smaller is nearer to the image
    "mrr": "mean of 1 / rank of the image among the gallery, by distance to the re-encoded sample",
    "first": "share of samples whose nearest image is the one",
    "distance": "squared distance from the re-encoded sample, in its place in the image, to the image's own condition",
    "pixel_rmse": "from the image's own pixels, 0 to 1",
    "feature_spread": "variance across seeds of the re-encoded samples, as a share of that across the gallery",
    "pixel_spread": "variance across seeds of the pixels, as a share of that across the gallery",
    "pixel_change": "mean square difference from the samples of its own condition with the same noise",
}


@dataclass(frozen=True)
class Faithfulness:
    """values: for each condition and metric, one number an image, [n]."""

    gallery: int
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def chance(self) -> dict[str, float]:
        """Of a sample that says nothing of its image."""
        return {"mrr": float((1 / torch.arange(1, self.gallery + 1)).mean()), "first": 1 / self.gallery}

    def answers(self, condition: str) -> list[Answer]:
        """The means over images with their intervals."""
        return [mean(metric, values) for metric, values in self.values[condition].items()]

    def ahead(self, control: str) -> list[Answer]:
        """How far samples of its own condition are from a control's, image by image."""
        own, others = self.values[OWN], self.values[control]
        return [mean(m, own[m] - others[m]) for m in ("mrr", "distance", "pixel_rmse")]


def mean(metric: str, values: Tensor) -> Answer:
    numbers = values.double().numpy()
    interval = resampled(len(numbers), lambda counts: float(counts @ numbers / len(numbers)))
    return Answer(metric, float(numbers.mean()), interval)


@torch.no_grad()
def faithfulness(method: RCDM, gallery: Tensor, masks: Masks, images: int, samples: int, sampling: Sampling,
                 control: RCDM | None = None, note: Callable[[str], None] = lambda name: None) -> Faithfulness:  # fmt: skip
    """gallery: uint8 [G, C, H, W], of which the first `images` are painted. masks: of POSITIONS blocks; the i-th image takes the
    i-th of them, and round again. control: a decoder for the same networks with random weights. note: told whose samples are
    being painted.
    """
    bench = Bench(method, gallery, masks, images)
    own = bench.conditions(method, bench.masks)
    painters = {OWN: (method, own), OTHER: (method, own.roll(POSITIONS, 0)), MEAN: (method, own.mean(0).expand_as(own))}
    if method.config.of == "prediction":
        elsewhere = moved(bench.masks.targets, method.condition.networks.product.config.grid)
        painters[WRONG] = (method, bench.conditions(method, Masks(bench.masks.context, elsewhere)))
    if control is not None:
        painters[RANDOM] = (control, bench.conditions(control, bench.masks))
    found = Faithfulness(len(gallery))
    first: Tensor | None = None
    for name, (painter, conditions) in painters.items():
        note(name)
        squares = paint(painter, conditions, samples, sampling)
        first = squares if first is None else first
        found.values[name] = bench.measure(squares, own, first)
    found.values[REAL] = bench.measure(bench.real[:, None], own, None)
    return found


def moved(targets: Tensor, grid: Grid) -> Tensor:
    """Blocks of the same shape in that corner of the grid which is farthest from each. targets: int64 [B, 1, T]."""
    rows, columns = targets[:, 0].numpy() // grid[1], targets[:, 0].numpy() % grid[1]
    shape = (int(rows[0, -1] - rows[0, 0] + 1), int(columns[0, -1] - columns[0, 0] + 1))
    corners = [
        [
            0 if 2 * first > side - extent else side - extent
            for first, side, extent in zip(corner, grid, shape, strict=True)
        ]
        for corner in zip(rows[:, 0], columns[:, 0], strict=True)
    ]
    return torch.from_numpy(block_indices(np.array(corners)[:, None], shape, grid))


class Bench:
    """What samples are measured against: the images' own pixels, and how a gallery looks at the same places.

    For ranks and spreads a painted block is encoded alone, so that nothing of the image around it tells which one it is; for the
    distance to the condition it is encoded in its place, as what is predicted is.
    """

    def __init__(self, method: RCDM, gallery: Tensor, masks: Masks, images: int) -> None:
        self.method, self.n = method, images
        places = torch.arange(images) % POSITIONS
        self.masks = masks.rows(places.numpy())
        self.device = method.device
        self.images = gallery[:images]
        normalised = method.normalise(self.images.to(self.device))
        self.boxes = method.boxes(normalised, self.masks.to(self.device)).cpu()
        self.real = (method.target(normalised, self.masks.to(self.device)).cpu() + 1) / 2  # [n, C, S, S]
        self.known = []  # of each place, the gallery's features there, [G, D]
        self.spread_of_pixels = []  # and the variance of its pixels there
        for place in range(min(POSITIONS, images)):
            here = masks.rows(np.full(len(gallery), place))
            self.known.append(self.look(gallery, here.targets[:, 0]))
            cuts = self.batched(
                gallery, here.targets[:, 0], lambda x, block: method.target(x, Masks(block, block[:, None]))
            )
            self.spread_of_pixels.append((cuts / 2).var(0).mean())

    def conditions(self, method: RCDM, masks: Masks) -> Tensor:
        """What a decoder is told of the images. float32 [n, D] on the CPU."""
        return method.condition(method.normalise(self.images.to(self.device)), masks.to(self.device)).cpu()

    def look(self, images: Tensor, blocks: Tensor) -> Tensor:
        """Features of what is painted by itself, [B, D]. images: uint8 or float from 0 to 1; blocks: int64 [B, T]."""
        return self.batched(images, blocks, lambda x, block: self.encode(x, block, alone=True))

    def encode(self, x: Tensor, block: Tensor, alone: bool) -> Tensor:
        condition, config = self.method.condition, self.method.config
        if config.of == "image":
            return condition.features(x)
        return condition.alone(x, block) if alone and config.paint == "block" else condition.features(x, block)

    def batched(self, images: Tensor, blocks: Tensor, encode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat(
            [
                encode(self.method.normalise(x.to(self.device)), block.to(self.device)).cpu()
                for x, block in zip(images.split(BATCH), blocks.split(BATCH), strict=True)
            ]
        )

    def measure(self, squares: Tensor, own: Tensor, same_noise: Tensor | None) -> dict[str, Tensor]:
        """Every metric of samples [n, K, C, S, S], a number an image, [n]. own: conditions [n, D]."""
        n, k = squares.shape[:2]
        flat, blocks = squares.flatten(0, 1), self.masks.targets[:, 0].repeat_interleave(k, 0)
        boxes = [(int(a), int(b), int(c), int(d)) for a, b, c, d in self.boxes.repeat_interleave(k, 0).tolist()]
        painted = paste(self.images.repeat_interleave(k, 0) / 255, flat, boxes)
        alone = self.look(painted, blocks).view(n, k, -1)
        inside = self.batched(painted, blocks, lambda x, block: self.encode(x, block, alone=False)).view(n, k, -1)
        ranks = torch.stack([self.ranks(i, alone[i]) for i in range(n)])  # n K
        result = {
            "mrr": (1 / ranks).mean(1),
            "first": (ranks == 1).float().mean(1),
            "distance": (inside - own[:, None]).square().sum(-1).mean(1),
            "pixel_rmse": (squares - self.real[:, None]).square().mean((1, 2, 3, 4)).sqrt(),
        }
        if k > 1:
            features = torch.stack([known.var(0).sum() for known in self.known])
            places = torch.arange(n) % POSITIONS
            result["feature_spread"] = alone.var(1).sum(-1) / features[places]
            result["pixel_spread"] = squares.var(1).mean((1, 2, 3)) / torch.stack(self.spread_of_pixels)[places]
        if same_noise is not None:
            result["pixel_change"] = (squares - same_noise).square().mean((1, 2, 3, 4))
        return result

    def ranks(self, i: int, alone: Tensor) -> Tensor:
        """The place of the i-th image in the gallery by distance to each of its samples, from 1. alone: [K, D]. Returns [K]."""
        distances = torch.cdist(
            alone[None], self.known[i % POSITIONS][None], compute_mode="donot_use_mm_for_euclid_dist"
        )[0]
        return ((distances < distances[:, i : i + 1]).sum(1) + 1).float()

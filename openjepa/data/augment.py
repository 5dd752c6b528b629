"""What happens to an image on its way in: I-JEPA's is a random resized crop, and nothing else by default."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from openjepa.data.decode import Box, Raw, decode
from openjepa.errors import UserError

NUMBERS = 32  # uniforms that one image's augmentation may use
TRIES = 10


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random resized crop (scale 0.3 to 1, bilinear, as released); flip, jitter and blur are off in I-JEPA."""

    crop_scale: tuple[float, float] = (0.3, 1.0)  # share of the image's area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.0  # probability
    jitter: float = 0.0  # strength s: brightness, contrast, saturation 0.8 s, hue 0.2 s, with probability 0.8
    blur: float = 0.0  # probability of a Gaussian of sigma 0.1 to 2 pixels

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"augment.crop_scale is ({low}, {high}): give a range within 0 to 1, the smaller first")
        low, high = self.crop_aspect
        if not 0 < low <= high:
            raise UserError(f"augment.crop_aspect is ({low}, {high}): give a positive range, the smaller first")
        for name in ("flip", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}: a probability is between 0 and 1")
        if not 0 <= self.jitter <= 2:
            raise UserError(f"augment.jitter is {self.jitter}: a strength is between 0 and 2")


def augment(raw: Raw, config: AugmentConfig, size: tuple[int, int], channels: int, numbers: np.ndarray) -> np.ndarray:
    """One augmented view.

    numbers: NUMBERS uniforms in [0, 1), the sample's own. Returns uint8 [height, width, channels]. Raises BadImage.
    """
    pixels = decode(raw, lambda w, h: random_resized_crop(w, h, config, numbers), size, channels)
    u = numbers[2 * TRIES + 2 :]
    if u[0] < config.flip:
        pixels = pixels[:, ::-1]
    if (config.jitter and u[1] < 0.8) or u[2] < config.blur:
        import torch  # seconds of import that I-JEPA itself never needs
        from torchvision.transforms.v2 import functional as T

        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        if config.jitter and u[1] < 0.8:
            factors = 1 + config.jitter * 0.8 * (2 * u[3:6] - 1)
            image = T.adjust_brightness(image, max(0.0, factors[0]))
            image = T.adjust_contrast(image, max(0.0, factors[1]))
            if channels == 3:
                image = T.adjust_saturation(image, max(0.0, factors[2]))
                image = T.adjust_hue(image, float(np.clip(config.jitter * 0.2 * (2 * u[6] - 1), -0.5, 0.5)))
        if u[2] < config.blur:
            image = T.gaussian_blur(image, [2 * (min(size) // 20) + 1] * 2, [0.1 + 1.9 * u[7]])
        pixels = image.permute(1, 2, 0).numpy()
    return pixels


def random_resized_crop(width: int, height: int, config: AugmentConfig, u: np.ndarray) -> Box:
    """The first of ten random boxes that fits, as torchvision draws them; otherwise the largest central one."""
    ratios = np.exp(
        np.log(config.crop_aspect[0]) + u[1 : 2 * TRIES : 2] * np.log(config.crop_aspect[1] / config.crop_aspect[0])
    )
    areas = (
        width * height * (config.crop_scale[0] + u[0 : 2 * TRIES : 2] * (config.crop_scale[1] - config.crop_scale[0]))
    )
    for area, ratio in zip(areas, ratios, strict=True):
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u[2 * TRIES] * (height - h + 1)), int(u[2 * TRIES + 1] * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < config.crop_aspect[0]:
        h = max(1, round(width / config.crop_aspect[0]))
    elif width / height > config.crop_aspect[1]:
        w = max(1, round(height * config.crop_aspect[1]))
    return central(width, height, w, h)


def centre_crop(width: int, height: int, size: tuple[int, int], share: float = 1.0) -> Box:
    """The largest central box of the output's aspect, less a border: share 0.875 is "resize 256, crop 224"."""
    scale = min(width / size[1], height / size[0]) * share
    return central(width, height, size[1] * scale, size[0] * scale)


def central(width: int, height: int, w: float, h: float) -> Box:
    left, top = max(0.0, (width - w) / 2), max(0.0, (height - h) / 2)  # never -1e-15
    return left, top, min(left + w, width), min(top + h, height)

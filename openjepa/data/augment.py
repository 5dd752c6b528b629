"""What happens to an image on its way in: I-JEPA's is a random resized crop, and nothing else by default.

MAE flips; iBOT looks at several crops of an image, each distorted in its own way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from openjepa.data.decode import Box, Raw, Resize, decode
from openjepa.errors import UserError

NUMBERS = 32  # uniforms that one image's augmentation may use
TRIES = 10


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random resized crop (scale 0.3 to 1, bilinear, as released); the rest is off in I-JEPA. In the order of the values."""

    crop_scale: tuple[float, float] = (0.3, 1.0)  # share of the image's area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    resize: Resize = "bilinear"  # of the crop, with antialiasing
    flip: float = 0.0  # probability
    jitter: tuple[float, float, float, float] = (0, 0, 0, 0)  # most of brightness, contrast, saturation, hue; for 80 %
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian of sigma 0.1 to 2 pixels
    solarise: float = 0.0  # probability that values of 128 and more are turned round

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"augment.crop_scale is ({low}, {high}): give a range within 0 to 1, the smaller first")
        low, high = self.crop_aspect
        if not 0 < low <= high:
            raise UserError(f"augment.crop_aspect is ({low}, {high}): give a positive range, the smaller first")
        for name in ("flip", "grey", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}: a probability is between 0 and 1")
        if min(self.jitter) < 0 or max(self.jitter) > 2 or self.jitter[3] > 0.5:
            raise UserError(
                f"augment.jitter is {self.jitter}: brightness, contrast, saturation up to 2 each, hue up to 0.5"
            )


def augment(raw: Raw, config: AugmentConfig, size: tuple[int, int], channels: int, numbers: np.ndarray) -> np.ndarray:
    """One augmented view.

    numbers: NUMBERS uniforms in [0, 1), the sample's own. Returns uint8 [height, width, channels]. Raises BadImage.
    """
    pixels = decode(raw, lambda w, h: random_resized_crop(w, h, config, numbers), size, channels, config.resize)
    u = numbers[2 * TRIES + 2 :]
    if u[0] < config.flip:
        pixels = pixels[:, ::-1]
    jitter, grey = any(config.jitter) and u[1] < 0.8, channels >= 3 and u[8] < config.grey
    colours = min(channels, 3)  # of four channels the last is none
    if jitter or grey or u[2] < config.blur:
        import torch  # seconds of import that I-JEPA itself never needs
        from torchvision.transforms.v2 import functional as T

        image, alpha = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).split([colours, channels - colours])
        if jitter:
            factors = 1 + np.array(config.jitter[:3]) * (2 * u[3:6] - 1)
            image = T.adjust_brightness(image, max(0.0, factors[0]))
            image = T.adjust_contrast(image, max(0.0, factors[1]))
            if colours == 3:
                image = T.adjust_saturation(image, max(0.0, factors[2]))
                image = T.adjust_hue(image, config.jitter[3] * (2 * u[6] - 1))
        if grey:
            image = T.rgb_to_grayscale(image, 3)
        if len(alpha):
            image = torch.cat([image, alpha])
        if u[2] < config.blur:
            sigma = 0.1 + 1.9 * u[7]
            reach = min(math.ceil(3 * sigma), min(size) - 1)  # beyond it nothing counts, or nothing can be mirrored
            image = T.gaussian_blur(image, [2 * reach + 1] * 2, [sigma])
        pixels = image.permute(1, 2, 0).numpy()
    if u[9] < config.solarise:
        pixels = np.where((pixels < 128) | (np.arange(channels) >= colours), pixels, 255 - pixels)
    return pixels


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Several crops of every image (DINO, iBOT): two large ones, of which `augment` is the first, and small ones."""

    second_blur: float = 0.1  # of the second large crop, as augment.blur is of the first
    second_solarise: float = 0.2
    small: int = 10  # crops an image
    # height, width in pixels; null: 96 of 224 of the large ones, in whole patches
    small_size: tuple[int, int] | None = None
    small_scale: tuple[float, float] = (0.05, 0.25)  # share of the image's area
    small_blur: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.small <= 64:
            raise UserError(f"crops.small is {self.small}: give 0 to 64 small crops an image")
        if self.small_size and min(self.small_size) < 1:
            raise UserError(f"crops.small_size is {self.small_size}: both sides must be at least 1")
        for name in ("second_blur", "second_solarise", "small_blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"crops.{name} is {getattr(self, name)}: a probability is between 0 and 1")
        low, high = self.small_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"crops.small_scale is ({low}, {high}): give a range within 0 to 1, the smaller first")

    def large(self, first: AugmentConfig) -> tuple[AugmentConfig, AugmentConfig]:
        return first, replace(first, blur=self.second_blur, solarise=self.second_solarise)

    def little(self, first: AugmentConfig) -> AugmentConfig:
        return replace(first, crop_scale=self.small_scale, blur=self.small_blur, solarise=0.0)


def random_resized_crop(width: int, height: int, config: AugmentConfig, u: np.ndarray) -> Box:
    """The first of ten random boxes that fits, as torchvision draws them; otherwise the largest central one."""
    smallest, largest = config.crop_scale
    lowest, aspects = math.log(config.crop_aspect[0]), math.log(config.crop_aspect[1] / config.crop_aspect[0])
    drawn = u[: 2 * TRIES + 2].tolist()
    for scale, aspect in zip(drawn[0 : 2 * TRIES : 2], drawn[1 : 2 * TRIES : 2], strict=True):
        area, ratio = width * height * (smallest + scale * (largest - smallest)), math.exp(lowest + aspect * aspects)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(drawn[2 * TRIES] * (height - h + 1)), int(drawn[2 * TRIES + 1] * (width - w + 1))
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

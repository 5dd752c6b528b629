"""`openjepa bench data`: from the bytes of a photograph to a random crop, on one core, beside the usual ways."""

from __future__ import annotations

import io
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from PIL import Image

from openjepa.bench.clock import Rows, in_turn, spread
from openjepa.data.augment import NUMBERS, AugmentConfig, augment
from openjepa.data.decode import DAMAGE
from openjepa.data.scenes import Job, render_range
from openjepa.data.sources import open_source
from openjepa.errors import UserError
from openjepa.rng import Draws

PHOTOS = 24  # made here
READ = 200  # of a data set
SIZE = (390, 466)  # height, width: about ImageNet's
CROP = (224, 224)


def photographs() -> list[bytes]:
    """JPEGs of rendered scenes with the grain of a camera, 4:2:0, quality 92."""
    grain = Draws(0, "grain", np.arange(PHOTOS)).uniform(*SIZE, 3)
    found = []
    for image, noise in zip(render_range(Job(0, 0, PHOTOS, SIZE)), grain, strict=True):
        pixels = (image + 24 * (noise - 0.5)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        found.append(buffer.getvalue())
    return found


def encoded(spec: str) -> list[bytes]:
    """The first JPEGs of a data set, as they lie there, but for damaged ones. Raises UserError where there are none."""
    source = open_source(spec)
    found = [raw for raw in map(source.read, range(min(READ, len(source)))) if isinstance(raw, bytes) and whole(raw)]
    if not found:
        raise UserError(f"{spec} has no JPEGs, which all ways read: give a folder, Parquet or shards of them")
    return found


def whole(raw: bytes) -> bool:
    """Whether these are a JPEG's bytes, all of them."""
    try:
        image = Image.open(io.BytesIO(raw))
        image.load()
    except DAMAGE:
        return False
    return image.format == "JPEG"


def data(spec: str | None = None, repeats: int = 9) -> Rows:
    """Decode and RandomResizedCrop(224, scale 0.3 to 1); the ways take turns on the same photographs."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms.v2 import RandomResizedCrop as RandomResizedCrop2

    photos = encoded(spec) if spec else photographs()
    numbers = Draws(0, "augment", np.arange(len(photos))).uniform(NUMBERS)
    pillow, tensors = RandomResizedCrop(CROP, scale=(0.3, 1.0)), RandomResizedCrop2(CROP, scale=(0.3, 1.0))

    def with_pillow() -> None:
        for photo in photos:
            np.asarray(pillow(Image.open(io.BytesIO(photo)).convert("RGB")))

    def with_torchvision() -> None:
        for photo in photos:
            tensors(decode_jpeg(torch.frombuffer(bytearray(photo), dtype=torch.uint8), ImageReadMode.RGB))

    def ours() -> None:
        for photo, drawn in zip(photos, numbers, strict=True):
            augment(photo, AugmentConfig(), CROP, 3, drawn)

    ways: dict[str, Callable[[], None]] = {
        "Pillow + torchvision": with_pillow,
        "torchvision.io + v2": with_torchvision,
        "openjepa": ours,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = in_turn(ways, repeats)
    finally:
        torch.set_num_threads(threads)
    first = median(seconds["Pillow + torchvision"])
    return [
        {
            "way": name,
            "images_per_s": len(photos) / median(taken),
            "over_pillow": first / median(taken),
            **spread(taken),
            "images": len(photos),
            "kilobytes": float(np.mean([len(photo) for photo in photos])) / 1000,
        }
        for name, taken in seconds.items()
    ]

"""Images with dense answers beside them, in a folder.

ROOT/images/…/NAME.jpg    the images
ROOT/masks/…/NAME.png     classes of pixels, 8 bits, 255 where there is none; ROOT/classes.txt names them, one a line
ROOT/depth/…/NAME.png     depths of pixels, 16 bits, in millimetres, 0 where it is not known
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from openjepa.data.decode import DAMAGE, FORMATS, BadImage, refuse_pixels
from openjepa.data.sources import EXTENSIONS, Folder, stamp, walk
from openjepa.errors import UserError, first_line

FOLDERS = {"masks": "segmentation", "depth": "depth"}  # and the task's name
MILLIMETRES = 1000.0


class Annotated(Folder):
    """The images that every one of the folders beside them has an answer for; others are refused by name."""

    def __init__(self, root: Path) -> None:
        files = list(walk(root / "images"))
        if not files:
            raise UserError(
                f"data '{root}': no images in {root / 'images'} (looked for {', '.join(sorted(EXTENSIONS))})"
            )
        super().__init__(root / "images", files)
        self.labels, self.classes = {}, {}
        self.beside = {task: root / name for name, task in FOLDERS.items() if (root / name).is_dir()}
        self.maps = {task: class_names(root) if task == "segmentation" else None for task in self.beside}
        for folder in self.beside.values():
            for file in files:
                if not (answer := answer_of(folder, file)).exists():
                    raise UserError(f"data '{root}': {answer} is missing, the answer for images/{file}")

    def read_map(self, task: str, index: int) -> np.ndarray:
        file = answer_of(self.beside[task], self.files[index])
        try:
            with Image.open(file, formats=FORMATS) as image:
                refuse_pixels(*image.size)
                values = np.asarray(image)
        except (BadImage, *DAMAGE) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)})") from error
        with Image.open(os.path.join(self.root, self.files[index]), formats=FORMATS) as seen:
            size = seen.size
        if values.ndim == 2 and sorted(values.shape) != sorted(size):  # sorted: some images are stored lying
            h, w = values.shape
            raise UserError(f"{file} is {w}x{h} pixels, its image {size[0]}x{size[1]}: a map has its image's size")
        if values.ndim != 2:
            raise UserError(f"{file} has {values.shape[-1]} channels: a map has one")
        if task == "depth":
            return (values / MILLIMETRES).astype(np.float32)
        classes = self.maps[task] or []
        known = values[values != 255]
        if known.size and known.max() >= len(classes):
            raise UserError(f"{file} has class {known.max()}: classes.txt names 0 to {len(classes) - 1}")
        return values.astype(np.uint8)

    def stamps(self) -> list[str]:
        """Of the images, and of all that lies beside them."""
        beside = [stamp(answer_of(folder, file)) for folder in self.beside.values() for file in self.files]
        return [*super().stamps(), *beside]


def answer_of(folder: Path, image: str) -> Path:
    return folder / (os.path.splitext(image)[0] + ".png")


def class_names(root: Path) -> list[str]:
    try:
        names = [line.strip() for line in (root / "classes.txt").read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"data '{root}': masks need classes.txt beside them, one class a line ({error.strerror})"
        ) from error
    if not 2 <= len(names) <= 255:
        raise UserError(f"{root / 'classes.txt'} names {len(names)} classes: 2 to 255 are expected")
    return names

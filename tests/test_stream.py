"""Claims about images that are lost on the way: each is replaced, named once, and changes nothing else."""

import io
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from openjepa.data.order import epoch_order
from openjepa.data.sources import open_source
from openjepa.data.stream import DataConfig, Steps, batches
from openjepa.recipes import pretrain as pretrain_module
from openjepa.recipes.pretrain import pretrain
from openjepa.recipes.recipe import Recipe, override
from tests.helpers import encoded, logged, same, steps_of, weights
from tests.test_decode import jpeg_of_scans, jpeg_that_says, png_that_says


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


# From a picture to an ending and the bytes of a file that is odd, and good.
ODD: dict[str, Callable[[Image.Image], tuple[str, bytes]]] = {
    "cmyk": lambda image: ("jpg", encoded(image.convert("CMYK"), "JPEG")),
    "16 bits": lambda image: (
        "png",
        encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8), "PNG"),
    ),
    "1 bit": lambda image: ("png", encoded(image.convert("1"), "PNG")),
    "palette": lambda image: ("png", encoded(image.quantize(16), "PNG")),
    "grey and alpha": lambda image: ("png", encoded(image.convert("LA"), "PNG")),
    "alpha": lambda image: ("webp", encoded(image.convert("RGBA"), "WEBP", lossless=True)),
    "wrong ending": lambda image: ("png", encoded(image, "JPEG")),
    "progressive": lambda image: ("jpeg", encoded(image, "JPEG", progressive=True)),
    "turned": lambda image: ("JPG", encoded(image, "JPEG", exif=exif(6))),
    "gif": lambda image: ("bmp", encoded(image, "GIF")),
    "tiff": lambda image: ("tif", encoded(image, "TIFF")),
}

# The same of files that cannot be read.
DAMAGED: dict[str, Callable[[Image.Image], tuple[str, bytes]]] = {
    "truncated jpeg": lambda image: ("jpg", encoded(image, "JPEG")[:-200]),
    "truncated png": lambda image: ("png", encoded(image, "PNG")[:-200]),
    "a header alone": lambda image: ("jpg", encoded(image, "JPEG")[:160]),
    "zero bytes": lambda image: ("jpg", b""),
    "zeros": lambda image: ("png", bytes(4000)),
    "text": lambda image: ("jpg", b"<html>404 Not Found</html>"),
    "noise after a beginning": lambda image: ("jpg", b"\xff\xd8\xff\xe0" + np.random.default_rng(0).bytes(900)),
    "another kind": lambda image: ("jpg", encoded(image, "EPS")),
    "floating point": lambda image: ("tif", encoded(image.convert("F"), "TIFF")),
    "bomb": lambda image: ("png", png_that_says(60_000, 60_000, rows=10)),
    "bomb of scans": lambda image: ("jpg", jpeg_of_scans(2000)),
    "progressive bomb": lambda image: ("jpg", jpeg_that_says(65_500, 65_500, progressive=True)),
}

# And of what is no readable file at all.
UNREADABLE: dict[str, Callable[[Path], None]] = {
    "link to nothing": lambda file: file.symlink_to("nothing.png"),
    "link to itself": lambda file: file.symlink_to(file.name),
    "pipe": lambda file: os.mkfifo(file),
    **(
        {"closed": lambda file: (file.write_bytes(b"x"), file.chmod(0))[0]} if os.geteuid() else {}
    ),  # nothing is closed to root
}


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((45, 36))
    return Image.fromarray((np.asarray(coarse) * 0.8 + rng.integers(0, 50, (36, 45, 3))).astype(np.uint8))


def write_images(root: Path, count: int, bad_every: int) -> list[str]:
    """So many files, one in `bad_every` of them bad, one in nine odd and good. Returns the names of the bad ones."""
    bad = []
    root.mkdir()
    kinds = [*DAMAGED, *UNREADABLE]
    for number in range(count):
        image, name = picture(number), f"{number:05}"
        kind = kinds[number // bad_every % len(kinds)] if number % bad_every == bad_every - 1 else None
        if kind in UNREADABLE:
            name += ".png"
            UNREADABLE[kind](root / name)
        else:
            odd = list(ODD.values())[number // 9 % len(ODD)] if number % 9 == 0 else None
            make = DAMAGED[kind] if kind else odd or (lambda image: ("jpg", encoded(image, "JPEG")))
            ending, content = make(image)
            name += f".{ending}"
            (root / name).write_bytes(content)
        if kind:
            bad.append(name)
    assert len(bad) >= len(kinds), "not every kind is there"
    return bad


def mended(bad: list[str]) -> type[Steps]:
    """Steps that are told in advance which images stand in the place of the bad ones, and never meet those."""

    class Mended(Steps):
        @cache  # noqa: B019  # of a few epochs
        def order(self, epoch: int) -> np.ndarray:
            names = [self.source.name(i) for i in range(len(self.source))]
            order = epoch_order(self.seed, "order", epoch, len(names))[np.arange(len(names))]
            good = np.array([names[i] not in lost for i in order])
            return np.array(
                [order[(place + np.roll(good, -place).argmax()) % len(order)] for place in range(len(order))]
            )

    lost = set(bad)
    return Mended


@pytest.mark.parametrize(
    ("count", "bad_every", "batch", "epochs"),
    [(300, 15, 20, 2), pytest.param(10_000, 33, 50, 4, marks=pytest.mark.slow)],
)
def test_bad_images_are_named_once_and_training_is_as_if_others_had_been_there(
    tiny: Recipe, tmp_path, monkeypatch, count, bad_every, batch, epochs
):
    bad = write_images(tmp_path / "images", count, bad_every)
    values = {
        "data.batch_size": batch,
        "schedule.epochs": epochs,
        "machine.workers": 2,
        "machine.checkpoint_every": epochs,
        "monitors.knn_every": 0,
    }
    recipe = override(tiny, {name: str(value) for name, value in values.items()})
    console = Console(file=io.StringIO(), width=200)
    pretrain(recipe, str(tmp_path / "images"), tmp_path / "run", console)
    said = console.file.getvalue()
    assert "Traceback" not in said
    assert sorted(line.split()[3] for line in said.splitlines() if "unreadable image" in line) == sorted(bad)
    lines = (tmp_path / "run/bad_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(bad)
    assert all(line.split("\t")[1] for line in lines)

    monkeypatch.setattr(pretrain_module, "Steps", mended(bad))
    pretrain(recipe, str(tmp_path / "images"), tmp_path / "mended", Console(quiet=True))
    assert not (tmp_path / "mended/bad_images.txt").exists()
    losses = [[(m["step"], m["loss"]) for m in logged(tmp_path / run) if "loss" in m] for run in ("run", "mended")]
    assert len(losses[0]) == epochs * count // batch
    assert losses[0] == losses[1]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "mended"))


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_good(tmp_path, kind):
    ending, content = ODD[kind](picture(1))
    (tmp_path / f"x.{ending}").write_bytes(content)
    (batch,) = batches(steps_of(open_source(str(tmp_path)), data=DataConfig(batch_size=1)), 0, 1, 0, pin=False)
    assert not batch.bad
    assert batch.images.float().std() > 20  # a picture, not a plane

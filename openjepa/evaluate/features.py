"""Frozen features of whole images: what every protocol starts from, extracted once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from openjepa.data.augment import centre_crop
from openjepa.data.decode import PIXELS_VERSION, BadImage, Box, Raw, decode
from openjepa.data.sources import Source, cache_folder
from openjepa.data.workers import loaded
from openjepa.errors import UserError
from openjepa.models.encoder import Encoder
from openjepa.models.vit import Tokens, ViT

PIXELS = 64  # longer side of the raw-pixel control: a probe on more has more weights than data sets have images
BLOCK = 4096  # images that are marked as done together
BATCH = 256
VERSION = 1  # of what is stored


# ---------------------------------------------------------------- whole images


@dataclass(frozen=True)
class View:
    """How a whole image becomes an input: its central crop, or all of it squashed.

    size: height and width in pixels. share: of the longest central crop's side; 0.875 is "resize 256, crop 224". squash:
    the whole image without keeping its aspect, as CLEVR needs (Protocols, D.2).
    """

    size: tuple[int, int]
    channels: int = 3
    share: float = 1.0
    squash: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"--crop {self.share}: a share of the image's side is above 0 and at most 1")

    def box(self, width: int, height: int) -> Box:
        return (0, 0, width, height) if self.squash else centre_crop(width, height, self.size, self.share)


class Images(Dataset[Tensor]):
    """Some images of a source in one view, in order. Items: uint8 [channels, H, W]."""

    def __init__(
        self,
        source: Source,
        indices: Sequence[int] | np.ndarray,
        view: View,
        skip_bad: bool = False,  # unreadable ones are black, with 0 for a hash, instead of an error
    ) -> None:
        self.source, self.indices, self.view, self.skip_bad = source, indices, view, skip_bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Tensor:
        return self.read(i)[0]

    def choose(self, i: int) -> Callable[[int, int], Box]:
        """From an image's width and height to the box that the view shows, the same for all."""
        return self.view.box

    def flips(self, i: int) -> bool:
        return False

    def read(self, i: int) -> tuple[Tensor, int]:
        """An image, and the hash of its contents before decoding."""
        index = int(self.indices[i])
        try:
            raw = self.source.read(index)
            pixels = decode(raw, self.view.box, self.view.size, self.view.channels)
        except (BadImage, OSError) as error:
            if self.skip_bad:
                return torch.zeros(self.view.channels, *self.view.size, dtype=torch.uint8), 0
            raise UserError(f"unreadable image {self.source.name(index)} ({error}): leave it out") from error
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), content_hash(raw)


def readable(source: Source, indices: Sequence[int] | np.ndarray, view: View) -> tuple[Tensor, list[int]]:
    """Those of some images that can be read, uint8 [n, channels, H, W], and their indices. Raises UserError where none can."""
    images = Images(source, indices, view, skip_bad=True)
    found = [(pixels, int(index)) for index, (pixels, content) in zip(indices, map(images.read, range(len(images))), strict=True)
             if content]  # fmt: skip
    if not found:
        refuse_unreadable(images)
    return torch.stack([pixels for pixels, _ in found]), [index for _, index in found]


def refuse_unreadable(images: Images) -> None:
    """Raises UserError, with the reason of the first, for images of which none can be read."""
    Images(images.source, images.indices, images.view)[0]


def content_hash(raw: Raw) -> int:
    """Of an image as it is stored, 64 bits."""
    content = raw if isinstance(raw, bytes) else np.asarray(raw).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def contents(source: Source) -> list[int]:
    """The hashes of all images of a source that can be read."""
    found = []
    for index in range(len(source)):
        with contextlib.suppress(BadImage, OSError):  # whoever decodes it names it
            found.append(content_hash(source.read(index)))
    return found


class Hashed(Dataset[tuple[Tensor, int]]):
    """The images with their hashes, for the workers of a loader."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images.read(i)


# ---------------------------------------------------------------- who makes features


class Extractor(Protocol):
    """Images to features: `view` is what it wants to see, `identity` all that its numbers depend on."""

    view: View

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, layers, D] on the CPU."""
        ...

    def patches(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, N, D], one vector a patch, on the device."""
        ...


class EncoderFeatures:
    """Pooled patch features of an encoder's last layers, or its class token's, each after the final norm (appendix A)."""

    def __init__(self, encoder: Encoder, view: View, autocast: Callable[[], AbstractContextManager[Any]],
                 precision: str, layers: int = 4, tokens: Tokens = "patches") -> None:  # fmt: skip
        """Raises UserError for the class token of an encoder without one."""
        if tokens == "class" and not encoder.vit.config.class_token:
            raise UserError("this encoder has no class token: leave --tokens out")
        self.encoder, self.view, self.autocast, self.precision, self.layers = encoder, view, autocast, precision, layers
        self.tokens = tokens

    @cached_property
    def identity(self) -> dict[str, Any]:
        mean, std = self.encoder.statistics()
        return {
            "weights": weights_hash(self.encoder.vit),
            "model": asdict(self.encoder.vit.config),
            "mean": mean,
            "std": std,
            "view": asdict(self.view),
            "decoding": PIXELS_VERSION,
            "layers": self.layers,
            "precision": self.precision,
            **({} if self.tokens == "patches" else {"tokens": self.tokens}),
        }

    def __call__(self, images: Tensor) -> Tensor:
        vit = self.encoder.vit
        with torch.no_grad(), self.autocast():
            normalised = self.encoder.normalise(images.to(vit.patch_embed.proj.weight.device))
            outputs = vit.intermediate(normalised, vit.last(self.layers), self.tokens)
        return torch.stack([o.float().mean(1) for o in outputs], dim=1).cpu()

    def patches(self, images: Tensor) -> Tensor:
        with torch.no_grad(), self.autocast():
            return self.encoder(images.to(self.encoder.vit.patch_embed.proj.weight.device)).float()


class PixelFeatures:
    """The control that any representation should beat: the view itself, its longer side averaged down to 64 pixels.

    Its patches are those of the encoder beside it, as they are.
    """

    def __init__(self, view: View, patch: int = 1, device: torch.device | str = "cpu") -> None:
        self.view, self.patch, self.device = view, patch, device
        shrink = max(1.0, max(view.size) / PIXELS)
        self.size = tuple(max(1, round(side / shrink)) for side in view.size)
        self.identity: dict[str, Any] = {
            "pixels": self.size,
            "patch": patch,
            "view": asdict(view),
            "decoding": PIXELS_VERSION,
        }

    def __call__(self, images: Tensor) -> Tensor:
        small = F.interpolate(images.float(), self.size, mode="area") if self.size != self.view.size else images.float()
        return small.flatten(1)[:, None] / 255

    def patches(self, images: Tensor) -> Tensor:
        return F.unfold(images.to(self.device).float() / 255, self.patch, stride=self.patch).transpose(1, 2)


def weights_hash(vit: ViT) -> str:
    """A hash of every parameter, and of the positions, which may be interpolated ones."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in {**vit.state_dict(), "positions": vit.get_buffer("positions")}.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def short_hash(about: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()


def array_hash(*arrays: np.ndarray) -> str:
    """Of what arrays of numbers hold."""
    return hashlib.blake2b(b"|".join(array.tobytes() for array in arrays), digest_size=12).hexdigest()


@torch.no_grad()
def extract(extractor: Extractor, images: Images, workers: int = 0) -> Tensor:
    """Features of some images at once, without a store. float32 [n, layers, D]."""
    return torch.cat([extractor(batch) for batch in loaded(images, workers, batch_size=BATCH)])


# ---------------------------------------------------------------- the store


@dataclass(frozen=True)
class Features:
    """What is known of a set of images. values: [n, layers, D], memory-mapped, the last layer last; hashes: int64 [n] of
    the images' contents."""

    values: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, index: np.ndarray | slice) -> Tensor:
        """Some of them. float32 [k, layers, D]."""
        return torch.from_numpy(np.array(self.values[index], dtype=np.float32))

    def last(self) -> Tensor:
        """The last layer's alone, of all images. float32 [n, D]."""
        return torch.from_numpy(np.array(self.values[:, -1], dtype=np.float32))


def stored(extractor: Extractor, source: Source, fingerprint: str, share: tuple[int, int] = (0, 1), workers: int = 0,
           fresh: bool = False) -> Features:  # fmt: skip
    """The features of all images of a source, from the cache or into it.

    share: (rank, world size) of this process, which begins with its own part and ends when all parts are there. Raises
    UserError for images that cannot be read, features that are not finite, and a cache that cannot be written.
    """
    about = {"version": VERSION, "data": fingerprint, "images": len(source), **extractor.identity}
    folder = cache_folder() / "features" / short_hash(about)
    images = Images(source, np.arange(len(source)), extractor.view)
    try:
        if fresh and (folder / "done.npy").exists():
            (folder / "done.npy").unlink()
        made = opened(folder, extractor, images, about)
        for block in blocks_to_do(made.done, share):
            fill(made, block, extractor, images, workers)
    except OSError as error:
        raise UserError(f"cannot write to the cache {folder} ({error.strerror}): set OPENJEPA_CACHE") from error
    return Features(np.load(folder / "values.npy", mmap_mode="r"), np.load(folder / "hashes.npy"))


@dataclass(frozen=True)
class Store:
    """The open files of a store: features, hashes, and which blocks are whole."""

    values: np.memmap
    hashes: np.memmap
    done: np.memmap


def opened(folder: Path, extractor: Extractor, images: Images, about: dict[str, Any]) -> Store:
    """The store's files, made if they are not there. Those of several processes are the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    if not intact(folder):
        for name in ("done", "values", "hashes"):
            (folder / f"{name}.npy").unlink(missing_ok=True)
    if not (folder / "done.npy").exists():
        shape = extractor(images[0].repeat(2, 1, 1, 1)).shape[1:]  # [layers, D]; two: torch compiles anew for one
        blocks = -(-len(images) // BLOCK)
        create(folder / "values.npy", (len(images), *shape), np.float32)
        create(folder / "hashes.npy", (len(images),), np.int64)
        (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        create(folder / "done.npy", (blocks,), np.uint8)  # last: with it the store is open
    return Store(*(np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("values", "hashes", "done")))


def intact(folder: Path) -> bool:
    """Whether the files of a store are as long as they say, where there is one."""
    try:
        if (folder / "done.npy").exists():
            for name in ("values", "hashes", "done"):
                np.load(folder / f"{name}.npy", mmap_mode="r")
    except (ValueError, EOFError, FileNotFoundError):
        return False
    return True


def create(file: Path, shape: tuple[int, ...], dtype: Any) -> None:
    """An array of zeros on disk that appears whole, unless somebody else was faster."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    np.lib.format.open_memmap(part, "w+", dtype, shape).flush()
    try:
        if not file.exists():
            os.link(part, file)
    except FileExistsError:
        pass
    finally:
        part.unlink()


def blocks_to_do(done: np.ndarray, share: tuple[int, int]) -> Iterator[int]:
    """Blocks that nobody has done yet, beginning with one's own part."""
    rank, world = share
    first = rank * len(done) // world
    for block in np.roll(np.arange(len(done)), -first):
        if not done[block]:
            yield int(block)


def fill(store: Store, block: int, extractor: Extractor, images: Images, workers: int) -> None:
    """Extract one block and mark it. Raises UserError."""
    rows = range(block * BLOCK, min((block + 1) * BLOCK, len(images)))
    part = Hashed(Images(images.source, images.indices[rows.start : rows.stop], images.view))
    at = rows.start
    for batch, hashes in loaded(part, workers, batch_size=BATCH):
        features = extractor(batch)
        odd = ~torch.isfinite(features.flatten(1)).all(1)
        if odd.any():
            name = images.source.name(int(images.indices[at + int(odd.nonzero()[0])]))
            raise UserError(f"the features of {name} are not finite: the weights are damaged, or overflow in bf16")
        store.values[at : at + len(batch)] = features.numpy()
        store.hashes[at : at + len(batch)] = hashes.numpy()
        at += len(batch)
    store.values.flush()
    store.hashes.flush()
    store.done[block] = 1
    store.done.flush()

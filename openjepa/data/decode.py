"""Encoded bytes to a uint8 crop: open the header, choose the crop, decode (a much larger JPEG smaller), crop and resize.

Plain JPEGs are decoded by libjpeg-turbo into one array and resized by torch's antialiased kernel, at nearly twice Pillow's
speed (`openjepa bench data`); all others, PNG, WebP, BMP, TIFF and odd JPEGs, by Pillow. Transparency is laid on white, 16-bit
images keep their high byte, EXIF orientation is obeyed, CMYK and palettes become RGB.
"""

from __future__ import annotations

import io
import math
import re
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from openjepa.errors import first_line

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the upright image
Raw = bytes | Image.Image | np.ndarray
Resize = Literal["bilinear", "bicubic"]

PIXELS_VERSION = 2  # raise it when any pixel changes: features and answers of another version are made anew
MAX_BYTES = 2**28  # of one encoded image
MAX_PIXELS = 2**28  # decoded pixels of one image: 0.8 GB as RGB
MAX_SCANS = 100  # of one JPEG, each of which passes over all its pixels: 10 are usual
MAX_SECONDS = 60.0  # that one image may take
PIECE = 2**16  # bytes of input, after each of which Pillow's decoders come back to Python; that of BMP never leaves it
MAX_RUN = 2**16  # pixels in a row of a run-length BMP, of which two bytes may skip 255 rows
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow knows more: EPS, for one, runs a program
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit looks at the header alone, and a huge JPEG decodes small
ORIENTATION = 0x0112
JPEG_SPACES = {1: ("GRAY", ("YCbCr", "Gray")), 3: ("RGB", ("YCbCr", "RGB", "Gray"))}  # channels: asked for, of what
JPEG, BMP = b"\xff\xd8", b"BM"  # their first bytes
RUN_LENGTH = (1, 2)  # a BMP's kinds of compression, of 8 and 4 bits
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
MARKER = re.compile(rb"\xff+[\x02-\xcf\xd8-\xfe]")  # of a segment, whose length follows
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class BadImage(Exception):
    """An image that cannot be decoded; the message says why."""


DAMAGE = (OSError, ValueError, TypeError, LookupError, SyntaxError, EOFError, MemoryError, struct.error,
          Image.DecompressionBombError)  # what Pillow raises for damaged bytes  # fmt: skip


def decode(raw: Raw, choose: Callable[[int, int], Box], size: tuple[int, int], channels: int = 3,
           resize: Resize = "bilinear") -> np.ndarray:  # fmt: skip
    """Crop and resize one image with antialiasing.

    raw: encoded bytes, a Pillow image, or uint8 [H, W, C]. choose: from (width, height) of the upright image to
    the crop's box. size: (height, width) in pixels. Returns uint8 [height, width, channels].
    Raises BadImage.
    """
    short = isinstance(raw, bytes) and len(raw) <= PIECE and not raw.startswith(BMP)
    with nullcontext() if short or isinstance(raw, np.ndarray) else time_limit():
        plain = plain_jpeg(raw, choose, size, channels, resize) if isinstance(raw, bytes) else None
        return with_pillow(raw, choose, size, channels, resize) if plain is None else plain


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises BadImage after MAX_SECONDS, when the decoder next comes back to Python.

    In a process's main thread, where images are decoded; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise BadImage(f"it takes more than {MAX_SECONDS:g} s to decode")

    before = signal.signal(signal.SIGALRM, stop)
    other = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *other)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def with_pillow(raw: Raw, choose: Callable[[int, int], Box], size: tuple[int, int], channels: int,
                resize: Resize) -> np.ndarray:  # fmt: skip
    """As `decode`, for all that Pillow reads."""
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS) if isinstance(raw, bytes) else raw
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if image.format == "BMP" and image.info["compression"] in RUN_LENGTH and image.size[0] > MAX_RUN:
            raise BadImage(f"a run-length BMP of {image.size[0]} pixels in a row: more than {MAX_RUN} are refused")
        if image.format != "JPEG":  # which can decode smaller; to ask a PNG for its EXIF decodes it
            refuse_pixels(*image.size)
        turned = image.getexif().get(ORIENTATION, 1)
        if turned not in range(2, 9) or image.format == "TIFF":  # Pillow turns TIFF itself
            turned = 1
        width, height = image.size if turned < 5 else image.size[::-1]
        if isinstance(raw, bytes) and raw.startswith(JPEG):
            refuse_scans(raw, width * height)
        box = choose(width, height)
        if image.format == "JPEG" and turned == 1:  # let the DCT shrink it, to twice what is needed at least
            shrink = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
            image.draft(None, (int(2 * width / shrink), int(2 * height / shrink)))
        refuse_pixels(*image.size)
        image = ImageOps.exif_transpose(image) if turned != 1 else image
        x, y = image.size[0] / width, image.size[1] / height  # below 1 after a draft
        left, top, right, bottom = box[0] * x, box[1] * y, box[2] * x, box[3] * y
        outer = (int(left), int(top), min(math.ceil(right), image.size[0]), min(math.ceil(bottom), image.size[1]))
        image = to_mode(image.crop(outer), MODES[channels])  # no pixel outside the crop bleeds in
        inner = (left - outer[0], top - outer[1], right - outer[0], bottom - outer[1])
        pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling[resize.upper()], box=inner))
    except UnidentifiedImageError as error:  # its own message shows an object in memory
        raise BadImage("not an image of a kind that is read" if raw else "an empty file") from error
    except DAMAGE as error:
        raise BadImage(first_line(error)) from error
    return pixels[..., None] if channels == 1 else pixels


def plain_jpeg(raw: bytes, choose: Callable[[int, int], Box], size: tuple[int, int],
               channels: int, resize: Resize) -> np.ndarray | None:  # fmt: skip
    """As `decode` for an upright, undamaged JPEG whose crop lies on whole pixels; None where Pillow is to do it.

    The decoded pixels are Pillow's own; resized ones differ from Pillow's by the rounding of two passes.
    """
    if not raw.startswith(JPEG) or channels not in JPEG_SPACES:
        return None
    asked, known = JPEG_SPACES[channels]
    try:
        if b"Exif\0" in raw[:4096] and Image.open(io.BytesIO(raw), formats=FORMATS).getexif().get(ORIENTATION, 1) != 1:
            return None
        height, width, space, _ = simplejpeg.decode_jpeg_header(raw)
        if space not in known or width * height > MAX_PIXELS:
            return None
        refuse_scans(raw, width * height)
        box = choose(width, height)
        shrink = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
        whole = all(side == int(side) for side in box)
        if shrink >= 4 or not whole:  # Pillow lets the DCT shrink it, or cuts a pixel
            return None
        left, top, right, bottom = map(int, box)
        pixels = np.ascontiguousarray(simplejpeg.decode_jpeg(raw, asked)[top:bottom, left:right])
    except DAMAGE:  # Pillow takes some of it, and says what is wrong with the rest
        return None
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels last, in and out: else torch transposes twice
    return F.interpolate(image, size, mode=resize, antialias=True)[0].permute(1, 2, 0).contiguous().numpy()


def size_of(raw: bytes) -> tuple[int, int]:
    """Width and height that an image's header tells, before it is turned; nothing is decoded. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a kind that is read" if raw else "an empty file") from error
    except DAMAGE as error:
        raise BadImage(first_line(error)) from error


def refuse_pixels(width: int, height: int) -> None:
    """Raises BadImage for an image that would take more than MAX_PIXELS in memory."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS // 10**6} million")


def refuse_scans(raw: bytes, pixels: int) -> None:
    """Raises BadImage for a JPEG of more scans than MAX_SCANS, or of several over more than MAX_PIXELS, all kept at once.

    A few bytes make a scan, and libjpeg passes over every pixel for each without coming back.
    """
    allowed = 1 if pixels > MAX_PIXELS else MAX_SCANS
    if (
        raw.count(START_OF_SCAN) > allowed and (found := scans(raw)) > allowed
    ):  # the count is quick, and never too small
        raise BadImage(f"a JPEG of {found} scans: more than {allowed} over {pixels} pixels are refused")


def scans(raw: bytes) -> int:
    """How many a JPEG has, by its markers up to its end: thumbnails in its header and films behind it have their own."""
    count, place = 0, len(JPEG)
    while found := MARKER.search(raw, place):
        if found[0].endswith(END_OF_IMAGE):
            break
        count += found[0].endswith(START_OF_SCAN)
        place = found.end() + int.from_bytes(raw[found.end() : found.end() + 2])
    return count


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Any Pillow mode to 8-bit L, RGB or RGBA."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        values = np.asarray(image)
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("floating-point pixels have no fixed range: convert it to 8 or 16 bits")
    if mode != "RGBA" and (image.has_transparency_data or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)

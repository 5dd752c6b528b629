"""Claims about one image on its way in: formats, damage, crops, and the fast path for plain JPEGs."""

import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from openjepa.data import decode as decode_module
from openjepa.data.augment import NUMBERS, TRIES, AugmentConfig, CropsConfig, augment, centre_crop, random_resized_crop
from openjepa.data.decode import BadImage, decode
from openjepa.rng import Draws
from tests.helpers import RED, encoded, whole


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_formats_give_their_colours(kind):
    assert np.abs(whole(encoded(RED, kind)).astype(int) - (200, 20, 20)).max() <= 4


def test_grey_palette_cmyk_alpha_and_sixteen_bits():
    assert (whole(encoded(Image.new("L", (8, 8), 77), "PNG")) == 77).all()
    assert (whole(encoded(RED.quantize(4), "PNG")) == (200, 20, 20)).all()
    assert np.abs(whole(encoded(RED.convert("CMYK"), "JPEG")).astype(int) - (200, 20, 20)).max() <= 6
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert np.abs(whole(encoded(half, "PNG")).astype(int) - 127).max() <= 1  # half black on white
    deep = Image.fromarray(np.full((8, 8), 0x8040, dtype=np.uint16))
    assert (whole(encoded(deep, "PNG")) == 0x80).all()
    assert (whole(encoded(deep, "TIFF")) == 0x80).all()
    assert whole(encoded(RED, "PNG"), channels=1).shape == (8, 8, 1)


def test_a_dark_part_of_a_sixteen_bit_image_stays_dark():
    values = np.full((8, 8), 200, dtype=np.uint16)
    values[0, 0] = 60_000
    raw = encoded(Image.fromarray(values), "PNG")
    dark = decode(raw, lambda w, h: (4, 4, 8, 8), (4, 4), 1)
    assert (dark == whole(raw, channels=1)[4:, 4:]).all()


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encoded(RED.crop((0, 0, 8, 4)), "PNG", exif=exif)
    seen = []
    decode(raw, lambda w, h: seen.append((w, h)) or (0, 0, w, h), (4, 8))
    assert seen == [(8, 4)]


def test_tiff_and_png_turn_alike():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        size = (8, 16) if orientation < 5 else (16, 8)
        png, tiff = (whole(encoded(image, kind, exif=exif), size) for kind in ("PNG", "TIFF"))
        assert np.array_equal(png, tiff), orientation


def test_bytes_changed_at_random_never_raise_anything_but_bad_image():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    good = encoded(Image.new("RGB", (40, 30), "teal"), "JPEG", exif=exif)
    rng = np.random.default_rng(0)
    reasons = []
    for _ in range(1500):
        raw = bytearray(good)
        for place in rng.integers(0, len(raw) if rng.random() < 0.5 else 120, 3):
            raw[place] = rng.integers(0, 256)
        try:
            whole(bytes(raw))
        except BadImage as error:
            reasons.append(str(error))
    assert len(reasons) > 100
    assert not any("\n" in reason for reason in reasons)


def test_exif_orientation_is_obeyed():
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    out = whole(encoded(image, "PNG", exif=exif), size=(16, 8))
    assert out[:8].min() > 250
    assert out[8:].max() < 5


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_crops_are_antialiased_as_pillow_does(resize):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    box = (13, 7, 101, 80)
    expected = np.asarray(image.crop(box).resize((20, 16), Image.Resampling[resize.upper()])).astype(int)
    found = decode(encoded(image, "PNG"), lambda w, h: box, (16, 20), resize=resize).astype(int)
    assert np.abs(found - expected).max() <= 1


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray((np.asarray(coarse) * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("subsampling", "resize"), [(0, "bilinear"), (2, "bilinear"), (2, "bicubic")])
def test_plain_jpegs_are_what_pillow_makes_of_them(monkeypatch, channels, subsampling, resize):
    """To two levels of 255: torch's resize rounds between its two passes, Pillow's too, elsewhere."""
    raw = encoded(photo(233, 170), "JPEG", quality=90, subsampling=subsampling)
    for numbers in Draws(0, "x", np.arange(30)).uniform(NUMBERS):
        crop = partial(augment, raw, AugmentConfig(resize=resize), (64, 96), channels, numbers)
        fast = crop()
        with monkeypatch.context() as without:
            without.setattr(decode_module, "plain_jpeg", lambda *_: None)
            slow = crop()
        assert fast.shape == slow.shape == (64, 96, channels)
        difference = np.abs(fast.astype(int) - slow)
        assert difference.max() <= 2
        assert difference.mean() < 0.1


def test_plain_jpegs_alone_take_the_fast_path():
    def fast(raw: bytes, channels: int = 3) -> bool:
        return decode_module.plain_jpeg(raw, lambda w, h: (1, 2, 40, 30), (16, 16), channels, "bilinear") is not None

    image = photo(48, 40)
    turned = Image.Exif()
    turned[decode_module.ORIENTATION] = 6
    upright = Image.Exif()
    upright[decode_module.ORIENTATION] = 1
    assert fast(encoded(image, "JPEG"))
    assert fast(encoded(image, "JPEG"), channels=1)
    assert fast(encoded(image.convert("L"), "JPEG"))
    assert fast(encoded(image, "JPEG", exif=upright))
    assert fast(encoded(image, "JPEG", progressive=True))
    assert not fast(encoded(image, "JPEG", exif=turned))
    assert not fast(encoded(image, "JPEG"), channels=4)
    assert not fast(encoded(image.convert("CMYK"), "JPEG"))
    assert not fast(encoded(image, "PNG"))
    assert not fast(encoded(image, "JPEG")[:-200])


def test_large_jpegs_shrink_while_decoding_without_visible_change():
    x = np.linspace(0, 8 * np.pi, 1200)
    wave = (127 + 100 * np.sin(x)[None] * np.cos(x)[:, None]).astype(np.uint8)
    raw = encoded(Image.fromarray(np.stack([wave] * 3, -1)), "JPEG", quality=95)
    exact = np.asarray(Image.open(io.BytesIO(raw)).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(whole(raw, (64, 64)).astype(int) - exact).mean() < 1.0


@pytest.mark.parametrize(
    "raw", [b"", b"just text", encoded(RED, "JPEG")[:200], encoded(RED.resize((99, 99)), "PNG")[:90]]
)
def test_damaged_images_are_bad_images(raw):
    with pytest.raises(BadImage):
        whole(raw)


def test_a_single_pixel_is_an_image():
    assert (whole(encoded(RED.resize((1, 1)), "PNG")) == (200, 20, 20)).all()


def test_huge_images_decode_small_as_jpeg_and_are_refused_otherwise(monkeypatch):
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 500 * 500)
    big = Image.new("RGB", (2000, 2000), (10, 200, 10))
    assert whole(encoded(big, "JPEG"), (16, 16)).shape == (16, 16, 3)
    with pytest.raises(BadImage, match="2000x2000"):
        whole(encoded(big, "PNG"), (16, 16))


def test_crops_stay_inside_and_cover_the_range():
    config = AugmentConfig()
    shares = []
    for numbers in Draws(0, "x", np.arange(2000)).uniform(NUMBERS):
        left, top, right, bottom = random_resized_crop(300, 200, config, numbers)
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        shares.append((right - left) * (bottom - top) / 60_000)
    assert 0.29 < min(shares) < 0.32
    assert max(shares) > 0.85  # a 3:2 image holds no 4:3 crop larger than 8/9


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (448, 448), (96, 160)])
def test_central_crops_never_leave_the_image(size):
    for side in range(1, 700):
        for width, height in ((side, side), (640, side), (side, 333)):
            left, top, right, bottom = centre_crop(width, height, size)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_extreme_shapes_still_crop():
    for size in ((1, 1), (1, 500), (3000, 2)):
        left, top, right, bottom = random_resized_crop(*size, AugmentConfig(), np.full(NUMBERS, 0.999))
        assert right - left >= 1
        assert bottom - top >= 1
    assert centre_crop(256, 512, (224, 224), 0.875) == (16, 144, 240, 368)


def test_a_blur_is_a_whole_gaussian_also_of_a_small_crop():
    point = np.zeros((16, 16, 3), np.uint8)
    point[8, 8] = 255
    numbers = np.full(NUMBERS, 0.5)
    numbers[2 * TRIES + 2 + 7] = 0.5  # sigma 0.1 + 1.9 / 2
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), blur=1.0)
    found = augment(point, whole, (16, 16), 3, numbers)[..., 0].astype(float)
    spread = (found.sum(0) * (np.arange(16) - 8) ** 2).sum() / found.sum()
    assert spread == pytest.approx(1.05**2, rel=0.06)  # rounded to whole levels


def test_solarising_turns_the_bright_half_round():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_aspect=(1.0, 1.0), solarise=1.0)
    found = augment(grey, whole, (16, 16), 3, np.full(NUMBERS, 0.5))[..., 0].ravel()
    assert found.tolist() == [*range(128), *range(127, -1, -1)]


def test_views_are_distorted_as_their_place_says():
    first = AugmentConfig(crop_scale=(0.25, 1.0), flip=0.5, blur=1.0, solarise=0.0)
    crops = CropsConfig(second_blur=0.1, second_solarise=0.2, small_scale=(0.05, 0.25), small_blur=0.5)
    one, two = crops.large(first)
    assert one == first
    assert (two.crop_scale, two.blur, two.solarise) == ((0.25, 1.0), 0.1, 0.2)
    small = crops.little(replace(first, solarise=0.3))
    assert (small.crop_scale, small.flip, small.blur, small.solarise) == ((0.05, 0.25), 0.5, 0.5, 0.0)


def test_flip_jitter_and_blur_are_functions_of_their_numbers():
    raw = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)), "PNG")
    numbers = Draws(0, "x", [5]).uniform(NUMBERS)[0]
    config = AugmentConfig(flip=1.0, jitter=(0.8, 0.8, 0.8, 0.2), blur=1.0)
    a, b = augment(raw, config, (16, 16), 3, numbers), augment(raw, config, (16, 16), 3, numbers)
    plain = augment(raw, AugmentConfig(), (16, 16), 3, numbers)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, plain)
    assert np.array_equal(augment(raw, AugmentConfig(flip=1.0), (16, 16), 3, numbers), plain[:, ::-1])


# ---------------------------------------------------------------- made to harm


def png_that_says(width: int, height: int, rows: int = 0) -> bytes:
    """A PNG of a size in its header, with so many black rows of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(rows * (1 + 3 * width)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_that_says(width: int, height: int, **options: object) -> bytes:
    """A JPEG of 64x64 pixels with another size in its header."""
    raw = bytearray(encoded(Image.new("RGB", (64, 64), (10, 200, 10)), "JPEG", **options))
    place = max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2"))
    raw[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan until it has so many."""
    raw = encoded(RED, "JPEG", progressive=True)
    last = raw.rfind(decode_module.START_OF_SCAN)
    return raw[:last] + raw[last:-2] * (count - decode_module.scans(raw) + 1) + raw[-2:]


BOMBS = {
    "png": (png_that_says(30_000, 30_000, rows=10_000), "30000x30000 pixels are more than the limit"),
    "png of a header": (png_that_says(2**31 - 1, 2**31 - 1), "2147483647x2147483647 pixels are more than"),
    "progressive jpeg": (jpeg_that_says(65_500, 65_500, progressive=True), "a JPEG of 10 scans: more than 1 over"),
    "scans": (jpeg_of_scans(5000), "a JPEG of 5000 scans: more than 100 over"),
}
MEASURE = """
import re, sys
import numpy as np
from openjepa.data.augment import AugmentConfig, augment
from openjepa.data.decode import BadImage
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
raw = sys.stdin.buffer.read()
before = peak()
try:
    augment(raw, AugmentConfig(), (224, 224), 3, np.full(32, 0.5))
except BadImage as error:
    print(error)
print(peak() - before)
"""


def measured(raw: bytes) -> list[str]:
    """Why an image is refused, if it is, and how much memory that took, in bytes: told by a process of its own."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("a process's peak of memory is asked of Linux")
    told = subprocess.run([sys.executable, "-c", MEASURE], input=raw, capture_output=True, timeout=300)
    assert told.returncode == 0, told.stderr
    return told.stdout.decode().splitlines()


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(kind):
    raw, says = BOMBS[kind]
    assert len(raw) < 2**20
    reason, taken = measured(raw)
    assert says in reason
    assert int(taken) < 2**27  # decoded, each takes twenty times that


def test_the_largest_jpeg_takes_what_a_quarter_of_the_limit_does():
    """Its header says 4 gigapixels: libjpeg makes an eighth of each side, and grey where there are no data."""
    (taken,) = measured(jpeg_that_says(65_500, 65_500))
    assert 65_500**2 / 64 < int(taken) < 4 * decode_module.MAX_PIXELS


def test_scans_are_counted_as_libjpeg_finds_them():
    progressive = encoded(photo(64, 64), "JPEG", progressive=True)
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + 3 * 500) + b"\xff\xda\0" * 500
    film = b"\xff\xda" * 500
    usual = decode_module.scans(progressive)
    assert usual == progressive.count(b"\xff\xda") == 10
    assert decode_module.scans(progressive[:2] + thumbnail + progressive[2:] + film) == usual
    assert whole(progressive[:2] + thumbnail + progressive[2:] + film).shape == (8, 8, 3)
    for hidden in (b"\xff\xd0\xff\xff", b"\xff\x01\xff\xff", b"garbage", b"\xff\xff\xff"):  # no segments: no lengths
        raw = jpeg_of_scans(5000)
        with pytest.raises(BadImage, match="scans"):
            whole(raw[:20] + hidden + raw[20:])  # behind JFIF's own segment


def test_a_decode_that_takes_too_long_is_a_bad_image_and_leaves_no_alarm(monkeypatch):
    raw = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)), "PNG")
    assert len(raw) > 10 * decode_module.PIECE  # so that Pillow comes back to Python between its pieces
    before = signal.getsignal(signal.SIGALRM)
    with monkeypatch.context() as hurried:
        hurried.setattr(decode_module, "MAX_SECONDS", 1e-3)
        with pytest.raises(BadImage, match=r"takes more than 0.001 s to decode"):
            whole(raw)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert whole(raw).shape == (8, 8, 3)


def run_length_bmp(width: int, height: int) -> bytes:
    """One pixel a row, and what skips the rest of it."""
    body = b"\1\0\0\0" * height + b"\0\1"
    start = 14 + 40 + 4 * 256
    head = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    return (
        head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 256) + bytes(1024) + body
    )


def test_a_compressed_bmp_may_not_skip_over_memory_or_hours(monkeypatch):
    assert whole(run_length_bmp(64, 64)).shape == (8, 8, 3)
    with pytest.raises(BadImage, match="run-length BMP of 67108864 pixels in a row"):
        whole(run_length_bmp(2**26, 1))
    masks = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)
    wide = struct.pack("<IiiHHIIiiII", 40, 2**17, 1, 1, 32, 3, 2**19, 0, 0, 0, 0) + masks + bytes(2**19)
    assert whole(b"BM" + struct.pack("<IHHI", 14 + len(wide), 0, 0, 14 + 52) + wide).shape == (
        8,
        8,
        3,
    )  # nothing skipped
    monkeypatch.setattr(decode_module, "MAX_SECONDS", 1e-4)  # its decoder is Python: an alarm finds a short file, too
    with pytest.raises(BadImage, match="to decode"):
        whole(run_length_bmp(2**10, 2**10))


def test_the_alarm_of_somebody_else_still_comes(monkeypatch):
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        whole(RED)
        assert 0 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 1000
        os.kill(os.getpid(), signal.SIGALRM)
        assert came == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_formats_that_are_not_read_are_refused_and_no_program_is_run(monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise AssertionError("a program was run")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, run)
    monkeypatch.setattr(os, "system", run)
    Image.init()
    tried = []
    for kind in sorted(set(Image.SAVE) - set(decode_module.FORMATS)):
        try:
            raw = encoded(RED, kind)
        except (OSError, ValueError, KeyError, AssertionError):  # that Pillow cannot write here
            continue
        if not raw.startswith(decode_module.JPEG):  # MPO is one with others behind it
            tried.append(kind)
            with pytest.raises(BadImage, match="not an image of a kind that is read"):
                whole(raw)
    assert {"EPS", "PPM", "TGA", "PCX", "ICO"} <= set(tried)

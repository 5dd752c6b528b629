"""Claims about images: formats, damage, and the same batches from every source."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from openjepa.data import decode as decode_module
from openjepa.data.augment import NUMBERS, AugmentConfig, augment, centre_crop, random_resized_crop
from openjepa.data.decode import BadImage, decode
from openjepa.data.shards import expand_braces
from openjepa.data.sources import Source, open_source
from openjepa.data.stream import DataConfig, Steps, batches
from openjepa.errors import UserError
from openjepa.masking import MaskingConfig
from openjepa.rng import Draws


def whole(raw, size=(8, 8), channels=3) -> np.ndarray:
    return decode(raw, lambda w, h: (0, 0, w, h), size, channels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (8, 8), (200, 20, 20))


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


def test_crops_are_antialiased_as_pillow_does():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    box = (13, 7, 101, 80)
    expected = np.asarray(image.crop(box).resize((20, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode(encoded(image, "PNG"), lambda w, h: box, (16, 20)).astype(int) - expected).max() <= 1


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray((np.asarray(coarse) * 0.8 + rng.integers(0, 50, (height, width, 3))).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_plain_jpegs_are_what_pillow_makes_of_them(monkeypatch, channels, subsampling):
    """To two levels of 255: torch's resize rounds between its two passes, Pillow's too, elsewhere."""
    raw = encoded(photo(233, 170), "JPEG", quality=90, subsampling=subsampling)
    for numbers in Draws(0, "x", np.arange(30)).uniform(NUMBERS):
        crop = partial(augment, raw, AugmentConfig(), (64, 96), channels, numbers)
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
        return decode_module.plain_jpeg(raw, lambda w, h: (1, 2, 40, 30), (16, 16), channels) is not None

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


def test_flip_jitter_and_blur_are_functions_of_their_numbers():
    raw = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)), "PNG")
    numbers = Draws(0, "x", [5]).uniform(NUMBERS)[0]
    config = AugmentConfig(flip=1.0, jitter=1.0, blur=1.0)
    a, b = augment(raw, config, (16, 16), 3, numbers), augment(raw, config, (16, 16), 3, numbers)
    plain = augment(raw, AugmentConfig(), (16, 16), 3, numbers)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, plain)
    assert np.array_equal(augment(raw, AugmentConfig(flip=1.0), (16, 16), 3, numbers), plain[:, ::-1])


# ---------------------------------------------------------------- sources


def make_parquet(path: Path, files: list[Path], labels: list[int], names: list[str]) -> None:
    image = pa.array([{"bytes": f.read_bytes(), "path": f.name} for f in files])
    table = pa.table({"image": image, "label": pa.array(labels)})
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    pq.write_table(table, path, row_group_size=7)


def make_shards(root: Path, files: list[Path], labels: list[int]) -> None:
    half = len(files) // 2
    for shard in range(2):
        with tarfile.open(root / f"s-{shard:02}.tar", "w") as tar:
            for i in range(shard * half, shard * half + half):
                for name, data in (
                    (f"{i:06}{files[i].suffix}", files[i].read_bytes()),
                    (f"{i:06}.cls", str(labels[i]).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def three_sources(folder, tmp_path) -> list[Source]:
    files = sorted(folder.rglob("*.png"))
    labels = [int(f.parent.name == "red") for f in files]
    make_parquet(tmp_path / "x.parquet", files, labels, ["blue", "red"])
    make_shards(tmp_path, files, labels)
    specs = (str(folder), str(tmp_path / "x.parquet"), str(tmp_path / "s-{00..01}.tar"))
    return [open_source(spec) for spec in specs]


def steps_of(source: Source, **changes) -> Steps:
    settings = {"data": DataConfig(batch_size=8), "augment": AugmentConfig(), "masking": MaskingConfig()} | changes
    return Steps(source, image_size=(32, 32), grid=(8, 8), channels=3, seed=0, **settings)


def test_every_source_gives_the_same_batches(three_sources):
    for step in (0, 4, 5, 11):
        first, *others = [steps_of(source).batch(step) for source in three_sources]
        for other in others:
            assert torch.equal(first.images, other.images)
            assert torch.equal(first.masks.context, other.masks.context)


def test_every_source_knows_its_labels(three_sources):
    assert {tuple(s.labels["label"]) for s in three_sources} == {(0,) * 20 + (1,) * 20}
    assert three_sources[0].classes["label"] == three_sources[1].classes["label"] == ["blue", "red"]


def test_ranks_share_out_the_global_batch(folder):
    source = open_source(str(folder))
    whole_batch = steps_of(source).batch(3)
    parts = [steps_of(source, rank=r, world_size=2).batch(3) for r in range(2)]
    assert torch.equal(torch.cat([p.images for p in parts]), whole_batch.images)
    assert torch.equal(torch.cat([p.masks.context for p in parts]), whole_batch.masks.context)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_restarts_change_nothing(folder, workers):
    steps = steps_of(open_source(str(folder)))
    got = list(batches(steps, 3, 9, workers, pin=False))
    for step, batch in zip(range(3, 9), got, strict=True):
        assert torch.equal(batch.images, steps_of(steps.source).batch(step).images)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(folder):
    steps = steps_of(open_source(str(folder)))
    orders = [steps.order(e).copy() for e in (0, 1)]
    assert all(sorted(o) == list(range(40)) for o in orders)
    assert not np.array_equal(*orders)


def test_bad_images_are_named_and_replaced(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/red/00.png").write_bytes(b"")
    (tmp_path / "images/red/01.png").write_text("not an image")
    (tmp_path / "images/blue/05.png").write_bytes((folder / "blue/05.png").read_bytes()[:100])
    steps = steps_of(open_source(str(tmp_path / "images")))
    epoch = [steps.batch(s) for s in range(5)]
    assert {b.name for batch in epoch for b in batch.bad} == {"red/00.png", "red/01.png", "blue/05.png"}
    assert all(b.images.shape == (8, 3, 32, 32) for b in epoch)


def test_a_link_to_nothing_is_a_bad_image(folder, tmp_path):
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:16]):
        (tmp_path / f"{i:02}.png").write_bytes(file.read_bytes())
    (tmp_path / "16.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(str(tmp_path))
    assert source.fingerprint()
    steps = steps_of(source, data=DataConfig(batch_size=17))
    assert [b.name for b in steps.batch(0).bad] == ["16.png"]


def test_a_disk_that_fails_is_not_a_bad_image(folder, monkeypatch):
    source = open_source(str(folder))

    def fail(index):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(source, "read", fail)
    with pytest.raises(UserError, match="Input/output error"):
        steps_of(source).batch(0)


def test_shards_hold_no_file_open(three_sources):
    import os

    before = len(os.listdir("/dev/fd"))
    assert three_sources[2].read(0)
    assert three_sources[2].read(39)
    assert len(os.listdir("/dev/fd")) == before


def test_names_that_are_no_text_can_be_printed(tmp_path):
    import os

    with open(os.fsencode(str(tmp_path)) + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(RED, "PNG"))
    source = open_source(str(tmp_path))
    source.name(0).encode()
    assert isinstance(whole(source.read(0)), np.ndarray)


def test_only_labels_are_tasks(tmp_path):
    image = pa.array([{"bytes": encoded(RED, "PNG"), "path": None}] * 4)
    columns = {
        "image": image,
        "id": [0, 1, 2, 3],
        "width": [3, 3, 2, 1],
        "label": [0, 1, 1, 0],
        "fine_label": [-1, 0, 0, 1],
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({b"huggingface": b"{damaged"}), tmp_path / "x.parquet")
    assert set(open_source(str(tmp_path / "x.parquet")).labels) == {"label"}


def test_several_splits_in_one_folder_are_refused(three_sources, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}-00000-of-00001.parquet").write_bytes((tmp_path / "x.parquet").read_bytes())
    with pytest.raises(UserError, match="several splits"):
        open_source(str(folder))
    assert len(open_source(str(folder / "train*.parquet"))) == 40


def test_torchvision_splits_are_train_and_test(monkeypatch):
    import torchvision

    class Stub:
        def __init__(self, root, train=True, download=False):
            self.targets, self.classes = [int(train)] * 3, ["no", "yes"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    assert open_source("torchvision:CIFAR10").labels["label"][0] == 1
    assert open_source("torchvision:CIFAR10:test").labels["label"][0] == 0
    with pytest.raises(UserError, match="has the splits train and test"):
        open_source("torchvision:CIFAR10:tset")


def test_a_folder_of_nothing_but_damage_ends(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_text("no")
    with pytest.raises(UserError, match="images in a row cannot be read"):
        steps_of(open_source(str(tmp_path))).batch(0)


def test_a_worker_hands_on_the_users_mistake_in_one_line(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_text("no")
    with pytest.raises(UserError) as error:
        next(batches(steps_of(open_source(str(tmp_path))), 0, 3, 1, pin=False))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{tmp}/none", "no such file or folder"),
        ("{tmp}/empty", "no images in this folder"),
        ("{tmp}/x.parquet", "no such file"),
        ("{tmp}/s-{{0..3}}.tar", "no such file"),
        ("{tmp}/s-{{3..0}}.tar", "runs backwards"),
        ("{tmp}/notes.txt", "of a kind that is not read"),
        ("{tmp}/bad.parquet", "bad.parquet"),
        ("{tmp}/bad.tar", "bad.tar"),
        ("{tmp}/table.parquet", "no column"),
        ("torchvision:CIFAR11", "did you mean 'CIFAR10'"),
        ("scenes:0", "give a number of scenes"),
        ("scenes:9-3", "give a number of scenes"),
        ("scenes:many", "give a number of scenes"),
    ],
)
def test_data_that_is_not_there_is_refused_in_one_line(tmp_path, spec, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.parquet").write_text("hello")
    (tmp_path / "bad.tar").write_text("hello" * 300)
    pq.write_table(pa.table({"a": [1.5]}), tmp_path / "table.parquet")
    with pytest.raises(UserError, match=says) as error:
        open_source(spec.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


def test_a_batch_larger_than_the_data_is_refused(folder):
    with pytest.raises(UserError, match="larger than the data set of 40 images"):
        steps_of(open_source(str(folder)), data=DataConfig(batch_size=64))


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}-{0..1}") == ["x-0", "x-1", "y-0", "y-1"]


def test_remote_shards_read_like_local_ones(three_sources, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for shard in ("s-00.tar", "s-01.tar"):
        memory.pipe(f"/bucket/{shard}", (tmp_path / shard).read_bytes())
    remote = open_source("memory://bucket/s-{00..01}.tar")
    assert len(remote) == 40
    assert remote.read(33) == three_sources[2].read(33)


def test_real_parquet_and_shards(real_images):
    cifar = open_source(str(real_images / "cifar10/test.parquet"))
    assert len(cifar) == 10_000
    assert cifar.classes["label"][3] == "cat"
    photographs = open_source(str(real_images / "imagenet-sample/shard-{0000..0003}.tar"))
    assert len(photographs) == 1000
    assert len(set(photographs.labels["label"])) == 1000
    assert whole(photographs.read(500), (32, 32)).std() > 5

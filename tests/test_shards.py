"""Claims about shards: their index, and archives from strangers."""

import os
import pickle
import tarfile
import tracemalloc

import pytest

from openjepa.data import index as index_module
from openjepa.data import shards as shards_module
from openjepa.data.decode import MAX_BYTES, BadImage
from openjepa.data.shards import expand_braces
from openjepa.data.sources import open_source
from openjepa.data.tar import members
from openjepa.errors import UserError
from tests.helpers import RED, encoded, make_tar, refusal

PNG = encoded(RED, "PNG")

pytestmark = pytest.mark.usefixtures("impatient")


# ---------------------------------------------------------------- the index


def test_headers_are_read_as_pythons_own_library_does(tmp_path, real_images):
    long = "very/" * 60 + "long.jpg"
    files = [("a.jpg", b"x" * 700), ("b/c.cls", b"1"), (long, b"y" * 512), ("ünïcödé.png", b""), ("d.jpg", b"z")]
    paths = [make_tar(tmp_path / "gnu.tar", *files, form=tarfile.GNU_FORMAT),
             make_tar(tmp_path / "pax.tar", *files, form=tarfile.PAX_FORMAT),
             make_tar(tmp_path / "global.tar", *files, form=tarfile.PAX_FORMAT, pax={"comment": "of all"}),
             make_tar(tmp_path / "prefix.tar", ("p/" * 60 + "x" * 90, b"1"), ("q", b"2")),
             str(real_images / "imagenet-sample/shard-0002.tar")]  # fmt: skip
    for path in paths:
        with open(path, "rb") as file, tarfile.open(path) as archive:
            theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
            ours = list(members(lambda offset, size: os.pread(file.fileno(), size, offset), os.path.getsize(path)))
        assert ours == theirs


def test_a_set_is_indexed_once_and_again_when_a_shard_changes(two_shards, tmp_path, monkeypatch):
    first = open_source(two_shards)
    scans = []
    monkeypatch.setattr(index_module, "write_index", lambda *args: scans.append(args))
    again = open_source(two_shards)
    assert not scans
    assert again.fingerprint() == first.fingerprint()
    monkeypatch.undo()
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    make_tar(tmp_path / "s-01.tar", ("x.png", PNG), ("x.cls", b"0"))
    assert len(open_source(two_shards)) == 21


def test_memory_does_not_grow_with_the_samples(tmp_path):
    peaks = []
    for shards in (2, 20):
        for n in range(shards):
            make_tar(tmp_path / f"m{shards}-{n:02}.tar", *((f"{i:05}.jpg", b"") for i in range(500)))
        spec = str(tmp_path / f"m{shards}-{{00..{shards - 1:02}}}.tar")
        open_source(spec)
        tracemalloc.start()
        try:
            found = open_source(spec)
            assert len(found) == shards * 500
            found.name(len(found) - 1)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000  # bytes; a list of 9,000 more samples takes two million


def test_fresh_processes_get_the_index_and_not_its_contents(two_shards):
    source = open_source(two_shards)
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    assert pickle.loads(sent).fingerprint() == source.fingerprint()


def test_few_shards_are_held_open_and_each_once(two_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN", 3)
    for n in range(8):
        make_tar(tmp_path / f"f-{n}.tar", ("x.png", PNG))
    source = open_source(str(tmp_path / "f-{0..7}.tar"))

    def held():
        files = [os.path.realpath(f"/dev/fd/{number}") for number in os.listdir("/dev/fd")]
        return sum(os.path.basename(file).startswith("f-") for file in files)

    for _ in range(2):
        assert all(source.read(i) == PNG for i in range(8))
        assert held() == 3
    del source
    assert held() == 0


@pytest.mark.parametrize("damage", [b"", b"openjepa index 0", b"openjepa index 1" + b"\xff" * 8, "cut"])
def test_a_damaged_index_is_refused_by_name(two_shards, damage):
    file = open_source(two_shards).index.file
    file.write_bytes(file.read_bytes()[:300] if damage == "cut" else damage)
    assert f"{file} is damaged" in refusal(two_shards)


def test_labels_are_numbers_that_every_image_has(tmp_path):
    def labels(*contents):
        files = [
            (f"{i}.{name}", data)
            for i, content in enumerate(contents)
            for name, data in (("png", PNG), ("json" if content.startswith(b"{") else "cls", content))
        ]
        return open_source(make_tar(tmp_path / f"{len(os.listdir(tmp_path))}.tar", *files)).labels

    assert labels(b"3", b" 1\n", b'{"label": 2, "width": 8}')["label"].tolist() == [3, 1, 2]
    for odd in (
        b"cat",
        b"-1",
        b"1.5",
        b"9" * 5000,
        b"123456789012",
        b"[" * 10**5,
        b"{}",
        b'{"label": "x"}',
        b"\xff",
        b"null",
    ):
        assert labels(b"3", odd) == {}


def test_class_names_beside_the_shards_are_held_to_their_form(two_shards, tmp_path):
    about = tmp_path / "openjepa.json"
    about.write_text('{"classes": {"label": ["cold", "warm"]}, "whole": false}')
    assert open_source(two_shards).classes == {"label": ["cold", "warm"]}
    about.write_text('{"classes": {"label": ["cold"]}, "whole": false}')
    assert "has no name among 1 classes" in refusal(two_shards)
    for wrong in (
        "",
        "[]",
        '{"classes": 1, "whole": false}',
        '{"classes": {"label": [1]}, "whole": true}',
        "[" * 10**5,
    ):
        about.write_text(wrong)
        assert "openjepa.json is damaged" in refusal(two_shards)


# ---------------------------------------------------------------- archives from strangers


def test_names_of_other_places_are_labels_and_nothing_is_written(tmp_path):
    names = ["../../escape.png", "/etc/escape2.png", "a/../../../b.png", "new\nline\x1b[31m.png"]
    source = open_source(make_tar(tmp_path / "x.tar", *((name, PNG) for name in names), form=tarfile.PAX_FORMAT))
    assert all(source.read(i) == PNG for i in range(4))
    assert source.name(0).endswith("x.tar/../../escape.png")
    assert source.name(3).endswith(r"new\nline\x1b[31m.png")
    assert not [*tmp_path.parent.rglob("escape*"), *tmp_path.rglob("b.png")]
    assert not os.path.exists("/etc/escape2.png")


def test_links_devices_and_folders_are_passed_over(tmp_path):
    kinds = [bytes([kind]) for kind in b"123456"]
    odd = [(f"{i}.jpg", b"", {"type": kind, "linkname": "/etc/passwd"}) for i, kind in enumerate(kinds)]
    source = open_source(make_tar(tmp_path / "x.tar", *odd, ("a.png", PNG)))
    assert len(source) == 1
    assert source.read(0) == PNG


def test_sparse_members_and_endless_headers_are_refused(tmp_path):
    assert "sparse member" in refusal(make_tar(tmp_path / "s.tar", ("a.jpg", PNG, {"type": b"S"})))
    sparse = [("a.jpg", PNG, {"pax_headers": {"GNU.sparse.major": "1"}})]
    assert "sparse member" in refusal(make_tar(tmp_path / "p.tar", *sparse, form=tarfile.PAX_FORMAT))
    long = [("x", b"n" * (2**20 + 1), {"type": b"L"}), ("a.jpg", PNG)]
    assert "are refused" in refusal(make_tar(tmp_path / "l.tar", *long))
    assert "extended header" in refusal(
        make_tar(tmp_path / "b.tar", ("x", b"999 path=y\n", {"type": b"x"}), ("a.jpg", PNG))
    )
    assert "no number" in refusal(
        make_tar(tmp_path / "c.tar", ("x", b"13 size=-100\n", {"type": b"x"}), ("a.jpg", PNG))
    )


def test_sizes_that_lie_are_refused(tmp_path):
    make_tar(tmp_path / "x.tar", ("a.jpg", PNG))
    content = bytearray((tmp_path / "x.tar").read_bytes())
    for size in (b"77777777777\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12, b"-0000000001\0", b"12_3\0      8"):
        content[124:136] = size
        content[148:156] = b"%06o\0 " % (sum(content[:148]) + 256 + sum(content[156:512]))
        (tmp_path / "y.tar").write_bytes(content)
        assert "ends early" in refusal(str(tmp_path / "y.tar"))


def test_a_shard_that_ends_early_is_refused(two_shards, tmp_path):
    content = (tmp_path / "s-01.tar").read_bytes()
    for length in (100, 700, len(content) // 2 + 100):
        (tmp_path / "s-01.tar").write_bytes(content[:length])
        assert "s-01.tar" in refusal(two_shards)


def test_an_image_of_more_bytes_than_the_limit_is_a_bad_image_and_is_never_read(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = MAX_BYTES + 1
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + MAX_BYTES + 1024)  # a hole, which takes no disk
    with pytest.raises(BadImage, match="more than the limit"):
        open_source(str(tmp_path / "x.tar")).read(0)


@pytest.mark.parametrize("spec", ["{0..999999999999}.tar", "{0..9999}{0..9999}{0..9999}.tar", "{a,b}" * 40 + ".tar"])
def test_braces_that_name_too_much_are_refused(spec):
    with pytest.raises(UserError, match="more than"):
        expand_braces(spec)

"""Claims about shards: their index, archives from strangers, disks and stores that fail for a while."""

import http.server
import io
import json
import os
import pickle
import re
import tarfile
import threading
import time
import tracemalloc

import fsspec
import numpy as np
import pytest
from rich.console import Console

from openjepa.data import index as index_module
from openjepa.data import shards as shards_module
from openjepa.data import store
from openjepa.data.decode import MAX_BYTES, BadImage
from openjepa.data.shards import Shards, expand_braces
from openjepa.data.sources import open_source
from openjepa.data.store import patiently
from openjepa.data.stream import DataConfig, batches
from openjepa.data.tar import members
from openjepa.errors import UserError
from tests.helpers import RED, encoded, make_shards, whole
from tests.test_sources import steps_of

PNG = encoded(RED, "PNG")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENJEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "WAITS_S", (0.01, 0.02))


def tar(path, *files, form=tarfile.USTAR_FORMAT, pax=None):
    """An archive of (name, content), or of (name, content, changes to its header)."""
    with tarfile.open(path, "w", format=form, pax_headers=pax) as archive:
        for name, content, *changes in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in (changes[0] if changes else {}).items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def refusal(spec):
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def two_shards(folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    make_shards(tmp_path, files, [int(f.parent.name == "red") for f in files])
    return str(tmp_path / "s-{00..01}.tar")


# ---------------------------------------------------------------- the index


def test_headers_are_read_as_pythons_own_library_does(tmp_path, real_images):
    long = "very/" * 60 + "long.jpg"
    files = [("a.jpg", b"x" * 700), ("b/c.cls", b"1"), (long, b"y" * 512), ("ünïcödé.png", b""), ("d.jpg", b"z")]
    paths = [tar(tmp_path / "gnu.tar", *files, form=tarfile.GNU_FORMAT), tar(tmp_path / "pax.tar", *files, form=tarfile.PAX_FORMAT),
             tar(tmp_path / "global.tar", *files, form=tarfile.PAX_FORMAT, pax={"comment": "of all"}),
             tar(tmp_path / "prefix.tar", ("p/" * 60 + "x" * 90, b"1"), ("q", b"2")),
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
    tar(tmp_path / "s-01.tar", ("x.png", PNG), ("x.cls", b"0"))
    assert len(open_source(two_shards)) == 21


def test_memory_does_not_grow_with_the_samples(tmp_path):
    peaks = []
    for shards in (2, 20):
        for n in range(shards):
            tar(tmp_path / f"m{shards}-{n:02}.tar", *((f"{i:05}.jpg", b"") for i in range(500)))
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
        tar(tmp_path / f"f-{n}.tar", ("x.png", PNG))
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
        return open_source(tar(tmp_path / f"{len(os.listdir(tmp_path))}.tar", *files)).labels

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
    source = open_source(tar(tmp_path / "x.tar", *((name, PNG) for name in names), form=tarfile.PAX_FORMAT))
    assert all(source.read(i) == PNG for i in range(4))
    assert source.name(0).endswith("x.tar/../../escape.png")
    assert source.name(3).endswith(r"new\nline\x1b[31m.png")
    assert not [*tmp_path.parent.rglob("escape*"), *tmp_path.rglob("b.png")]
    assert not os.path.exists("/etc/escape2.png")


def test_links_devices_and_folders_are_passed_over(tmp_path):
    kinds = [bytes([kind]) for kind in b"123456"]
    odd = [(f"{i}.jpg", b"", {"type": kind, "linkname": "/etc/passwd"}) for i, kind in enumerate(kinds)]
    source = open_source(tar(tmp_path / "x.tar", *odd, ("a.png", PNG)))
    assert len(source) == 1
    assert source.read(0) == PNG


def test_sparse_members_and_endless_headers_are_refused(tmp_path):
    assert "sparse member" in refusal(tar(tmp_path / "s.tar", ("a.jpg", PNG, {"type": b"S"})))
    sparse = [("a.jpg", PNG, {"pax_headers": {"GNU.sparse.major": "1"}})]
    assert "sparse member" in refusal(tar(tmp_path / "p.tar", *sparse, form=tarfile.PAX_FORMAT))
    long = [("x", b"n" * (2**20 + 1), {"type": b"L"}), ("a.jpg", PNG)]
    assert "are refused" in refusal(tar(tmp_path / "l.tar", *long))
    assert "extended header" in refusal(tar(tmp_path / "b.tar", ("x", b"999 path=y\n", {"type": b"x"}), ("a.jpg", PNG)))
    assert "no number" in refusal(tar(tmp_path / "c.tar", ("x", b"13 size=-100\n", {"type": b"x"}), ("a.jpg", PNG)))


def test_sizes_that_lie_are_refused(tmp_path):
    tar(tmp_path / "x.tar", ("a.jpg", PNG))
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


# ---------------------------------------------------------------- disks and stores that fail


def test_reading_is_tried_again_with_doubling_waits(monkeypatch):
    monkeypatch.setattr(store, "WAITS_S", (1, 2, 4))
    waits, answers = [], [OSError(5, "Input/output error"), TimeoutError(), RuntimeError("no route"), "at last"]
    monkeypatch.setattr(time, "sleep", waits.append)

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently("x", read) == "at last"
    assert waits == [1, 2, 4]
    answers[:] = [OSError(5, "Input/output error")] * 9
    with pytest.raises(UserError, match=r"cannot read x: Input/output error \(4 tries, 7 s of waiting between them\)"):
        patiently("x", read)


def test_a_shard_that_vanishes_or_shrinks_is_no_bad_image(two_shards, tmp_path):
    source = open_source(two_shards)
    os.truncate(tmp_path / "s-00.tar", 600)
    with pytest.raises(UserError, match=r"s-00.tar: it ends early"):
        steps_of(source).batch(0)
    os.unlink(tmp_path / "s-00.tar")
    with pytest.raises(UserError, match=r"cannot read .*s-00.tar: No such file or directory \(3 tries"):
        steps_of(open_again(source)).batch(0)


def open_again(source):
    return pickle.loads(pickle.dumps(source))


def test_a_shard_that_comes_back_is_read_on(two_shards, tmp_path, monkeypatch):
    source = open_source(two_shards)
    os.rename(tmp_path / "s-00.tar", tmp_path / "away")
    monkeypatch.setattr(time, "sleep", lambda _: os.rename(tmp_path / "away", tmp_path / "s-00.tar"))
    assert whole(source.read(0)).shape == (8, 8, 3)


def test_a_shard_that_was_replaced_is_refused(two_shards, tmp_path):
    source = open_source(two_shards)
    tar(tmp_path / "new", *((f"{i}.png", PNG + bytes(i)) for i in range(99)))
    os.replace(tmp_path / "new", tmp_path / "s-00.tar")
    with pytest.raises(UserError, match="has changed since it was indexed"):
        [source.read(i) for i in range(20)]


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A web server of ranges, which fails as often as it is told to."""

    protocol_version = "HTTP/1.1"
    failures, requests, ranges, delay = 0, [], True, 0.0
    now, most = 0, 0  # requests at a time

    def do_GET(self):
        Ranges.now += 1
        Ranges.most = max(Ranges.most, Ranges.now)
        time.sleep(self.delay)
        Ranges.now -= 1
        return self.answer()

    def answer(self):
        path, asked = self.translate_path(self.path), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not os.path.isfile(path):
            return self.send_error(404)
        if asked and Ranges.failures > 0:
            Ranges.failures -= 1
            return self.send_error(503)
        with open(path, "rb") as file:
            content = file.read()
        self.requests.append((self.path, asked and (int(asked[1]), int(asked[2]))))
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked and self.ranges else content
        self.send_response(206 if asked and self.ranges else 200)
        if asked and self.ranges:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)
        return None

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name, value in (("failures", 0), ("requests", []), ("ranges", True), ("delay", 0.0)):
        monkeypatch.setattr(Ranges, name, value)
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Ranges(*a, directory=str(tmp_path)))
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


def test_a_web_server_is_read_like_a_disk_by_whoever_asks(two_shards, server):
    local, remote = open_source(two_shards), open_source(server + "/s-{00..01}.tar")
    assert remote.fingerprint() == local.fingerprint()
    for workers in (0, 2):
        for a, b in zip(
            batches(steps_of(local), 0, 6, 0, False), batches(steps_of(remote), 0, 6, workers, False), strict=True
        ):
            assert (a.images == b.images).all()


def test_an_image_is_one_request_of_its_own_bytes(two_shards, server):
    remote = open_source(server + "/s-{00..01}.tar")
    Ranges.requests.clear()
    content = remote.read(25)
    (path, (first, last)) = Ranges.requests[0]
    assert len(Ranges.requests) == 1
    assert path == "/s-01.tar"
    assert last - first + 1 == 512 + len(content)


def test_a_store_that_fails_for_a_while_is_read_on_and_then_refused(two_shards, server):
    remote = open_source(server + "/s-{00..01}.tar")
    Ranges.failures = 2
    assert remote.read(3)
    Ranges.failures = 99
    with pytest.raises(UserError, match=r"cannot read http://.*s-00.tar: 503.* \(3 tries"):
        steps_of(remote, data=DataConfig(batch_size=4)).batch(0)


def test_a_store_that_never_answers_is_asked_again_and_then_refused(two_shards, server, monkeypatch):
    remote = open_source(server + "/s-{00..01}.tar")
    monkeypatch.setattr(store, "STALL_S", 0.05)
    answering = threading.Event()
    monkeypatch.setattr(Ranges, "answer", lambda self: answering.wait(60) and self.send_error(503))
    with pytest.raises(UserError, match=r"s-00.tar: no answer in 0.05\d+ s \(3 tries"):
        remote.read(3)
    with pytest.raises(UserError, match=r"s-00.tar: no answer in 0.05 s \(3 tries"):
        remote.stamps()
    answering.set()


def test_a_read_that_is_slow_is_waited_for_by_its_size(monkeypatch):
    monkeypatch.setattr(store, "STALL_S", 0.0)
    slow = threading.Event()
    threading.Timer(0.2, slow.set).start()
    assert store.in_time(lambda: slow.wait(60), size=60_000_000)
    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        store.in_time(lambda: time.sleep(0.5))
    with pytest.raises(TimeoutError, match="of the store itself"):
        store.in_time(lambda: (_ for _ in ()).throw(TimeoutError("of the store itself")), size=60_000_000)


class Clock:
    """Time that passes where somebody sleeps, and nowhere else."""

    def __init__(self):
        self.now = 100.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("sizes", [[10_000] * 50, [3_000_000, 1, 1], [1] * 9 + [500_000] * 4])
def test_no_more_than_so_many_bytes_a_second_are_read(sizes):
    clock = Clock()
    pace, reads = store.Pace(0.5, lambda: clock.now, clock.sleep), []
    for size in sizes:
        pace.take(size)
        reads.append((clock.now, size))
    for first in range(len(reads)):
        for last in range(first, len(reads)):  # the last of any stretch goes through, and is waited off after it
            read = sum(size for _, size in reads[first:last])
            assert read <= 500_000 * (reads[last][0] - reads[first][0]) + 1e-3
    assert clock.now - 100 == pytest.approx(sum(sizes[:-1]) / 500_000)  # and no fewer


def test_an_idle_reader_saves_nothing_up():
    clock = Clock()
    pace = store.Pace(1.0, lambda: clock.now, clock.sleep)
    pace.take(2_000_000)
    clock.now += 60
    begun = clock.now
    pace.take(1_000_000)
    assert clock.now == begun
    pace.take(1)
    assert clock.now == begun + 1


def test_threads_share_a_pace_and_none_waits_where_there_is_no_limit():
    begins, clock = [], Clock()
    pace = store.Pace(1.0, lambda: 0.0, begins.append)
    threads = [threading.Thread(target=pace.take, args=(1_000_000,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(begins) == [1, 2, 3, 4, 5, 6, 7]  # seconds; the first begins at once
    store.Pace(None, lambda: 0.0, clock.sleep).take(10**12)
    assert clock.now == 100


def test_every_byte_of_a_store_is_counted(two_shards, server, folder, tmp_path, monkeypatch):
    """Of the index of a packed set, of headers that are indexed, and of images."""
    from openjepa.recipes.packing import pack

    pack(str(folder), tmp_path / "set", 500_000, Console(quiet=True))
    taken, sent = [], []
    monkeypatch.setattr(store._pace, "take", taken.append)
    send = http.server.SimpleHTTPRequestHandler.send_header

    def counting(self, name, value):
        if name == "Content-Length" and self.command == "GET" and os.path.exists(self.translate_path(self.path)):
            sent.append(int(value))
        send(self, name, value)

    monkeypatch.setattr(Ranges, "send_header", counting)
    open_source(f"{server}/s-{{00..01}}.tar").read(3)
    assert sum(taken) == sum(sent) > 10_000
    open_source(f"{server}/set/shard-{{000000..000000}}.tar").read(3)
    assert sum(taken) == sum(sent)


@pytest.mark.parametrize(("workers", "share"), [(0, 6.0), (2, 2.0)])
def test_the_processes_of_a_rank_share_its_megabytes(two_shards, tiny, tmp_path, monkeypatch, workers, share):
    """Where every worker reads, and the process that trains, which measures on images too."""
    from openjepa.recipes.pretrain import pretrain
    from openjepa.recipes.recipe import override

    read = Shards.read

    def reading(self, index):
        (tmp_path / f"{os.getpid()}-{store._pace.mb_s}").touch()
        return read(self, index)

    monkeypatch.setattr(Shards, "read", reading)
    values = {"machine.read_mb_s": "6", "machine.workers": str(workers)}
    pretrain(override(tiny, values), two_shards, tmp_path / "run", Console(quiet=True))
    seen = {(int(pid), rate) for pid, rate in (path.name.split("-") for path in tmp_path.glob("*-*.*[0-9]"))}
    assert {rate for pid, rate in seen if pid != os.getpid()} == ({str(share)} if workers else set())
    assert {rate for pid, rate in seen if pid == os.getpid()} == {
        "6.0",
        str(share),
    }  # before the workers are there: all
    assert store._pace.mb_s is None


def test_a_server_without_ranges_is_refused(two_shards, server):
    remote = open_source(server + "/s-{00..01}.tar")
    Ranges.ranges = False
    with pytest.raises(UserError, match="sends whole files"):
        remote.read(3)


def test_a_url_that_is_not_there_is_refused_at_once(server):
    began = time.monotonic()
    assert "nothing.tar" in refusal(server + "/nothing.tar")
    assert "Protocol not known" in refusal("nostore://x/y.tar")
    assert time.monotonic() - began < 5


def test_far_images_are_fetched_beside_each_other(two_shards, server, monkeypatch):
    remote = open_source(server + "/s-{00..01}.tar")
    monkeypatch.setattr(Ranges, "delay", 0.1)
    monkeypatch.setattr(Ranges, "most", 0)
    steps_of(remote, data=DataConfig(batch_size=32)).batch(0)
    assert 4 < Ranges.most <= store.THREADS


def test_the_index_of_a_packed_set_far_away_is_fetched_instead_of_scanning(folder, tmp_path, server):
    from openjepa.recipes.packing import pack

    pack(str(folder), tmp_path / "set", 50_000, Console(quiet=True))
    local = open_source(str(tmp_path / "set"))
    count = len(local.urls)
    Ranges.requests.clear()
    remote = open_source(f"{server}/set/shard-{{000000..{count - 1:06}}}.tar")
    assert remote.classes == local.classes
    assert remote.fingerprint() == local.fingerprint()
    read = sum(
        last - first for path, asked in Ranges.requests if asked and path.endswith(".tar") for first, last in [asked]
    )
    assert read <= sum(len(local.read(i)) + 512 for i in range(40))  # the fingerprint's own; no headers were looked for


def test_stamps_change_with_a_shard_in_a_store(two_shards, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/stamps/a.tar", (tmp_path / "s-00.tar").read_bytes())
    source = Shards(["memory://stamps/a.tar"])
    before = source.stamps()
    assert before == source.stamps()
    memory.pipe("/stamps/a.tar", (tmp_path / "s-01.tar").read_bytes())
    assert source.stamps() != before
    assert np.array_equal(Shards(["memory://stamps/a.tar"]).labels["label"], np.ones(20))
    assert json.dumps(before)

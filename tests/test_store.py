"""Claims about stores, near and far, that fail for a while or for good, and about how fast they are read."""

import http.server
import json
import os
import pickle
import re
import threading
import time

import fsspec
import numpy as np
import pytest
from rich.console import Console

from openjepa.data import store
from openjepa.data.shards import Shards
from openjepa.data.sources import open_source
from openjepa.data.store import patiently
from openjepa.data.stream import DataConfig, batches
from openjepa.errors import UserError
from tests.helpers import RED, encoded, make_tar, refusal, steps_of, whole

PNG = encoded(RED, "PNG")

pytestmark = pytest.mark.usefixtures("impatient")


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
    make_tar(tmp_path / "new", *((f"{i}.png", PNG + bytes(i)) for i in range(99)))
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

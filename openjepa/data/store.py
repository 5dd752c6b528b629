"""Files on a local disk or in any store that fsspec knows, read again when a disk or a network fails for a while."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from openjepa.data.sources import stamp
from openjepa.errors import UserError, first_line

T = TypeVar("T")
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between tries
THREADS = 16  # requests at a time, of one process
STALL_S = 60.0  # that a request may take, and one more for each of its megabytes
AT_ONCE = 2**22  # bytes of a file that is read from its beginning to its end
ABSENT = (FileNotFoundError, PermissionError, NotADirectoryError)  # some stores forbid what is not there
CHANGES = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")  # of stores


def is_remote(url: str) -> bool:
    return "://" in url


def patiently(url: str, read: Callable[[], T]) -> T:
    """What `read` returns, tried again with doubling waits. Raises UserError with the reason of the last try."""
    for pause in (*WAITS_S, None):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # every store raises its own kinds
            if pause is None:
                tries = f"{len(WAITS_S) + 1} tries, {sum(WAITS_S):g} s of waiting between them"
                raise UserError(f"cannot read {url}: {first_line(error)} ({tries})") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def in_time(read: Callable[[], T], size: int = 0) -> T:
    """What `read`, of so many bytes, returns. Raises TimeoutError where nothing comes: clients wait for minutes, or for ever."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(read())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # one that is stuck is left behind
    seconds = STALL_S + size / 1e6
    if not wait([done], seconds).done:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return done.result()


class Pace:
    """Megabytes a second that the threads of a process read at most, all together; None: as many as come.

    A read begins when those before it are paid off, so one of any size goes through. clock, sleep: in seconds.
    """

    def __init__(
        self,
        mb_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.mb_s, self.clock, self.sleep = mb_s, clock, sleep
        self._paid_at = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until a read of so many bytes may begin."""
        if self.mb_s is None:
            return
        with self._lock:
            now = self.clock()
            begin = max(now, self._paid_at)
            self._paid_at = begin + count / (self.mb_s * 1e6)
        if begin > now:
            self.sleep(begin - now)


_pace = Pace(None)


def limit(mb_s: float | None) -> None:
    """What this process reads from stores, from now on."""
    global _pace
    _pace = Pace(mb_s)


@contextmanager
def limited(mb_s: float | None) -> Iterator[None]:
    """What this process reads from stores meanwhile."""
    global _pace
    before = _pace
    limit(mb_s)
    try:
        yield
    finally:
        _pace = before


def locate(url: str) -> tuple[Any, str]:
    """The file system of a URL, that of this process, and the path in it. Raises UserError."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (
        ImportError,
        ValueError,
        TypeError,
        KeyError,
    ) as error:  # an unknown protocol, or one whose library is missing
        raise UserError(f"data '{url}': {first_line(error)}") from error


def about(url: str) -> tuple[int, str]:
    """A file's size in bytes, and a text that changes when it does. Raises UserError, at once if it is not there."""

    def ask() -> tuple[int, str]:
        try:
            if not is_remote(url):
                return os.path.getsize(url), stamp(url)
            found = in_time(lambda: info(url))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise UserError(f"data '{url}': {first_line(error)}") from error
        if found.get("type") == "directory" or found.get("size") is None:
            raise UserError(f"data '{url}': no file whose size the store tells")
        return int(found["size"]), " ".join(str(found[key]) for key in ("size", *CHANGES) if key in found)

    return patiently(url, ask)


def info(url: str) -> dict[str, Any]:
    """What a store says of a file."""
    fs, path = locate(url)
    found: dict[str, Any] = fs.info(path)
    return found


def content(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """A remote file, or a part of it."""
    fs, path = locate(url)
    return bytes(fs.cat_file(path, start=start, end=end))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes start to end - 1 of a remote file in one request. Raises UserError after some tries."""

    def ask() -> bytes:
        _pace.take(end - start)
        found = in_time(lambda: content(url, start, end), end - start)
        if len(found) > end - start:
            raise UserError(f"cannot read {url}: the server sends whole files where a part is asked for")
        if len(found) < end - start:
            raise OSError(f"{len(found)} bytes came instead of {end - start}")
        return found

    return patiently(url, ask)


def read_small(url: str, most: int) -> bytes | None:
    """A whole small file, None where there is none. Raises UserError, also above `most` bytes."""

    def ask() -> bytes | None:
        try:
            size = in_time(lambda: info(url))["size"] if is_remote(url) else os.path.getsize(url)
            if size > most:
                raise UserError(f"{url} has {size} bytes: more than {most} are refused")
            if not is_remote(url):
                return Path(url).read_bytes()
            _pace.take(size)
            return in_time(lambda: content(url), size)
        except ABSENT:
            return None

    return patiently(url, ask)


def copy(url: str, out: Path, most: int) -> bool:
    """Copy a remote file; not where there is none, or it has more than `most` bytes. Returns whether. Raises UserError."""

    def ask() -> int | None:
        try:
            size: int | None = in_time(lambda: info(url))["size"]
            return size
        except ABSENT:
            return None

    size = patiently(url, ask)
    if size is None or size > most:
        return False
    with open(out, "wb") as file:
        for start in range(0, size, AT_ONCE):
            file.write(read_range(url, start, min(start + AT_ONCE, size)))
    return True


def ahead(calls: Iterable[Callable[[], T]], threads: int = THREADS) -> Iterator[Callable[[], T]]:
    """The calls in their order, each made on a thread before it is asked for, at most `threads` of them at a time."""
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) == threads:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        pool.shutdown(cancel_futures=True)

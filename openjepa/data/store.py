"""Files on a local disk or in any store that fsspec knows, read again when a disk or a network fails for a while."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from openjepa.data.sources import stamp
from openjepa.errors import UserError, first_line

T = TypeVar("T")
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between tries
THREADS = 16  # requests at a time, of one process
CHANGES = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")  # of stores


def is_remote(url: str) -> bool:
    return "://" in url


def patiently(url: str, read: Callable[[], T]) -> T:
    """What `read` returns, tried again with doubling waits. Raises UserError with the reason of the last try."""
    for wait in (*WAITS_S, None):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # every store raises its own kinds
            if wait is None:
                tries = f"{len(WAITS_S) + 1} tries in {sum(WAITS_S):g} s"
                raise UserError(f"cannot read {url}: {first_line(error)} ({tries})") from error
            time.sleep(wait)
    raise AssertionError("unreachable")


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
            fs, path = locate(url)
            found = fs.info(path)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise UserError(f"data '{url}': {first_line(error)}") from error
        if found.get("type") == "directory" or found.get("size") is None:
            raise UserError(f"data '{url}': no file whose size the store tells")
        return int(found["size"]), " ".join(str(found[key]) for key in ("size", *CHANGES) if key in found)

    return patiently(url, ask)


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes start to end - 1 of a remote file in one request. Raises UserError after some tries."""

    def ask() -> bytes:
        fs, path = locate(url)
        found = bytes(fs.cat_file(path, start=start, end=end))
        if len(found) > end - start:
            raise UserError(f"cannot read {url}: the server sends whole files where a part is asked for")
        if len(found) < end - start:
            raise OSError(f"{len(found)} bytes came instead of {end - start}")
        return found

    return patiently(url, ask)


def read_small(url: str, limit: int) -> bytes | None:
    """A whole small file, None where there is none. Raises UserError, also above `limit` bytes."""

    def ask() -> bytes | None:
        try:
            fs, path = locate(url) if is_remote(url) else (None, url)
            if (size := fs.info(path)["size"] if fs else os.path.getsize(path)) > limit:
                raise UserError(f"{url} has {size} bytes: more than {limit} are refused")
            return bytes(fs.cat_file(path)) if fs else Path(path).read_bytes()
        except (FileNotFoundError, PermissionError, NotADirectoryError):  # some stores forbid what is not there
            return None

    return patiently(url, ask)


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

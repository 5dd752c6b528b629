"""A disk that remembers every call that changes it, can fail at any one of them, and says what a power failure would leave.

What POSIX promises and no more: contents are safe once their file was synced, names once their folder was; everything else may
or may not have reached the disk, in any order.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OWN_OPEN, OWN_FSYNC = builtins.open, os.fsync


class Disk:
    """Use as a context manager around what writes below `root`; patches are process-wide, so threads are seen, too.

    journal: (call, path relative to root, argument) for each call that went well. fail_at, error: the number of the call that
    raises instead.
    """

    def __init__(self, root: Path, fail_at: int | None = None, error: int = 0) -> None:
        self.root, self.fail_at, self.error = root, fail_at, error
        self.journal: list[tuple[str, str, Any]] = []
        self.times: list[int] = []  # nanoseconds at which each had gone well, of a clock that all processes share
        self.calls = 0
        self.failed: str | None = None  # the call that did
        self._own = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir")}

    def __enter__(self) -> Disk:
        builtins.open = io.open = self.open  # type: ignore[assignment]
        os.fsync = self.fsync
        os.rename = os.replace = self.rename
        for name in ("unlink", "remove", "mkdir", "rmdir"):
            setattr(os, name, lambda path, *args, _name=name, **more: self.change(_name, path, *args, **more))
        return self

    def __exit__(self, *_: object) -> None:
        builtins.open = io.open = OWN_OPEN
        os.fsync = OWN_FSYNC
        for name, function in self._own.items():
            setattr(os, name, function)

    def inside(self, path: Any, folder: int | None = None) -> str | None:
        """A path below the root, relative to it; None of any other. folder: descriptor of what it is relative to."""
        if isinstance(path, int):
            return None
        where = Path(os.readlink(f"/proc/self/fd/{folder}")) if folder is not None else Path.cwd()
        path = Path(os.path.normpath(where / os.fsdecode(path)))
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else None

    def note(self, *call: Any) -> None:
        self.journal.append(call)  # type: ignore[arg-type]
        self.times.append(time.monotonic_ns())

    def call(self, name: str, path: str) -> None:
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            self.failed = f"{name} {path}"
            raise OSError(self.error, os.strerror(self.error))

    def open(self, file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        path = self.inside(file)
        if path is None or not set(mode) & set("wax+"):
            return OWN_OPEN(file, mode, *args, **more)
        self.call("open", path)
        new = not Path(file).exists()
        stream = OWN_OPEN(file, mode, *args, **more)
        if new or "w" in mode:
            self.note("create" if new else "truncate", path, None)
        return Stream(self, stream, path)

    def fsync(self, descriptor: int) -> None:
        path = self.inside(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path is not None:
            self.call("fsync", path)
        OWN_FSYNC(descriptor)
        if path is not None:
            self.note("fsync", path, None)

    def rename(self, old: Any, new: Any, **more: Any) -> None:
        path = self.inside(old)
        if path is not None:
            self.call("rename", path)
        self._own["rename"](old, new, **more)
        if path is not None:
            self.note("rename", path, self.inside(new))

    def change(self, name: str, path: Any, *args: Any, dir_fd: int | None = None, **more: Any) -> None:
        below = self.inside(path, dir_fd)
        if below is not None:
            self.call(name, below)
        self._own[name](path, *args, dir_fd=dir_fd, **more)
        if below is not None:
            self.note(name, below, None)


class Stream:
    """An open file whose writes the disk sees."""

    def __init__(self, disk: Disk, stream: Any, path: str) -> None:
        self._disk, self._stream, self._path = disk, stream, path

    def write(self, data: Any) -> int:
        self._disk.call("write", self._path)
        written = self._stream.write(data)
        self._disk.note("write", self._path, data.encode() if isinstance(data, str) else bytes(data))
        return written

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class File:
    def __init__(self) -> None:
        self.now = self.safe = b""


class Folder:
    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.safe: dict[str, Any] = {}


def replayed(journal: list[tuple[str, str, Any]]) -> Folder:
    """The disk after these calls: what is there now, and what of it is safe. The root itself is."""
    root = Folder()

    def at(path: str) -> Any:
        found: Any = root
        for name in Path(path).parts:
            found = found.now[name]
        return found

    for call, path, argument in journal:
        parent, name = (at(str(Path(path).parent)), Path(path).name) if path != "." else (root, "")
        if call in ("create", "mkdir"):
            parent.now[name] = File() if call == "create" else Folder()
        elif call == "truncate":
            at(path).now = b""
        elif call == "write":
            at(path).now += argument
        elif call == "fsync":
            found = at(path)
            found.safe = found.now if isinstance(found, File) else dict(found.now)
        elif call == "rename":
            moved = parent.now.pop(name)
            at(str(Path(argument).parent)).now[Path(argument).name] = moved
        else:
            del parent.now[name]
    return root


def after_power_failure(journal: list[tuple[str, str, Any]]) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Every state that these calls may leave: (in words, contents by path, None for a folder).

    Of each folder that was not synced, its names as they were or as they are; of files that were not, contents that are there,
    are not, or are in half.
    """
    root = replayed(journal)
    unsure = [folder for folder in folders(root) if folder.now.keys() != folder.safe.keys() or any(
        folder.now[name] is not folder.safe[name] for name in folder.now)]  # fmt: skip
    for choice in itertools.product((True, False), repeat=len(unsure)):
        older = {id(folder) for folder, new in zip(unsure, choice, strict=True) if not new}
        for kept in ("kept", "lost", "torn"):
            yield f"names {choice}, contents {kept}", tree(root, older, kept)


def folders(top: Folder) -> list[Folder]:
    below = {id(f): f for f in (*top.now.values(), *top.safe.values()) if isinstance(f, Folder)}
    return list({id(f): f for f in (top, *(g for folder in below.values() for g in folders(folder)))}.values())


def tree(folder: Folder, older: set[int], kept: str, path: str = "") -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for name, item in (folder.safe if id(folder) in older else folder.now).items():
        where = f"{path}{name}"
        if isinstance(item, Folder):
            found |= {where: None, **tree(item, older, kept, where + "/")}
        elif kept == "kept" or item.now == item.safe:
            found[where] = item.now
        else:
            found[where] = item.safe if kept == "lost" else item.now[: len(item.now) // 2]
    return found


def lay_out(state: dict[str, bytes | None], root: Path) -> None:
    """Put a state on the real disk."""
    for path, contents in state.items():
        if contents is None:
            (root / path).mkdir(parents=True)
        else:
            (root / path).write_bytes(contents)

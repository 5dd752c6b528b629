"""Files and folders that appear whole or not at all, whenever the process or the power goes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from openjepa.errors import UserError, first_line


def write_whole(file: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    flush(part)
    part.rename(file)
    flush(file.parent)


def make_folder(path: Path) -> None:
    """A folder, and those above it, that stay."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def remove_folder(path: Path) -> None:
    """A folder that is gone at once, under its name: half of it is never there."""
    part = path.with_suffix(".part")
    path.rename(part)
    flush(path.parent)
    shutil.rmtree(part)


def flush(path: Path) -> None:
    """Force a file's contents, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_full(out: Path) -> None:
    """Raises UserError if something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another place")


def refuse_unwritable(out: Path) -> None:
    """Raises UserError if nothing can be made there. Makes nothing."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {out}: {there} is no folder that can be written to")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def taken(folder: Path, refusal: str) -> Iterator[None]:
    """One process alone. Raises UserError where another is at work."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(refusal) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears as `out` when all went well, and not at all otherwise. Raises UserError."""
    out = out.absolute().resolve()
    refuse_full(out)
    made = next((p for p in reversed([out, *out.parents]) if not p.exists()), None)  # the topmost that is new
    part = None
    try:
        make_folder(out.parent)
        part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        yield part
        readable(part)
        for path in (*part.rglob("*"), part):
            flush(path)
        if out.exists():  # and is empty; somebody may stand in it
            for file in part.iterdir():
                file.rename(out / file.name)
            flush(out)
        else:
            part.rename(out)
            flush(out.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot write to {out}: {first_line(error)}") from error
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)
        if made and not out.exists():
            for folder in (out.parent, *out.parent.parents):
                if folder == made.parent or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()


def readable(folder: Path) -> None:
    """The usual permissions: temporary folders, and files that safetensors writes, are closed to others."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)

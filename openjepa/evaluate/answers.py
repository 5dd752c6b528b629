"""evaluation.json: the answers that a folder holds, each under the question that it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openjepa.engine.run import environment
from openjepa.engine.whole import locked, write_whole
from openjepa.errors import UserError, first_line

FILE = "evaluation.json"
PLACE = ("train", "test", "network", "view", "task", "protocol", "of", "metric")  # what a table tells answers apart by


def read(folder: Path) -> list[dict[str, Any]]:
    """The answers that a folder holds, none if there is no file. Raises UserError for a damaged one."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(file.read_text())["results"]
        for record in found:
            _ = [record[name] for name in (*PLACE, "value", "interval", "spread", "details")]
        return found
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): move it away") from error


def identity(record: dict[str, Any]) -> str:
    """What another answer must share to take this one's place."""
    return json.dumps([record.get("question"), *(record[name] for name in PLACE)])


def write(folder: Path, records: Sequence[dict[str, Any]], skipped: Mapping[str, str]) -> None:
    """Add answers to those that are there by then; one takes the place of an older one to the same question."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            new = {identity(record): record for record in records}
            old = [record for record in read(folder) if identity(record) not in new]
            about = {"environment": environment(), "skipped": skipped, "results": [*old, *new.values()]}
            write_whole(folder / FILE, json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error

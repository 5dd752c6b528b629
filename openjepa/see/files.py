"""Pictures as files: PNGs that say by which command they were made, never over what another made."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from openjepa.engine.whole import refuse_unwritable
from openjepa.errors import UserError

MARK = "openjepa"  # the text of a PNG of ours: the command that made it, or all that it depends on


def refuse_picture(file: Path, flag: str, reads: Sequence[str] = ()) -> None:
    """Raises UserError for a place where no picture can be written, or where something lies that openjepa did not make.

    flag: that named it. reads: files that the same command reads.
    """
    if file.suffix.lower() != ".png" or file.is_dir():
        raise UserError(f"{flag} {file}: give a file of the kind .png, which says how it was made beside the picture")
    refuse_unwritable(file.parent)
    if not file.exists():
        return
    if any(Path(word).exists() and file.samefile(word) for word in reads):
        raise UserError(f"{flag} {file} is what is asked about: choose another name")
    try:
        with Image.open(file) as image:
            ours = MARK in getattr(image, "text", {})
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no picture at all
        ours = False
    if not ours:
        raise UserError(f"{flag} {file} is there and is no picture of openjepa's: choose another name")


def save_picture(figure: Figure, file: Path) -> None:
    """A figure as a PNG that says by which command it was made."""
    figure.savefig(file, dpi=150, metadata={MARK: shlex.join(["openjepa", *sys.argv[1:]])})

"""The exception that a user's mistake raises, and what errors say in one line."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_WORD = 100  # characters that somebody may have mistyped


class UserError(Exception):
    """A mistake the user can mend: one line saying what, where and what to do.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names from files may hold anything


class Diverged(UserError):
    """Training that stopped because its losses were not finite."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; of the disk's, without the number and the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(text: str) -> str:
    """What a traceback ends with."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def printable(text: str) -> str:
    """A name from elsewhere, on one line and without control characters or bytes that are no text."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'lr'?` for the known word nearest to `word`, or an empty string."""
    if len(word) > LONGEST_WORD:
        return ""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of optional libraries: a UserError that says which extra of the package to install."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"this needs {error.name or 'a library'} that is not installed: pip install 'openjepa[{extra}]'"
        ) from error

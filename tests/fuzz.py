"""How what comes from outside is tried: on a fixed list of inputs that hypothesis makes, or, slow, on thousands of new ones."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from openjepa.errors import UserError

HANGS_S = 60  # far above what any input takes

LAX = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
QUICK = settings(LAX, derandomize=True, max_examples=200, phases=[Phase.explicit, Phase.generate])
LONG = settings(LAX, max_examples=4000)
EFFORTS = pytest.mark.parametrize(
    "effort", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)


def hold(claim: Callable[..., None], effort: settings, *inputs: st.SearchStrategy) -> None:
    effort(given(*inputs)(claim))()


@contextmanager
def read_or_refused() -> Iterator[None]:
    """What happens inside ends, and ends well or in a UserError of one line."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"it hangs: {HANGS_S} s")

    refusal = None
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_S)
    try:
        yield
    except UserError as error:
        refusal = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert refusal is None or refusal.isprintable(), f"not one line: {refusal!r}"
    assert refusal is None or 0 < len(refusal) < 5000, "a line that nobody reads"


def files_below(folder: Path) -> set[str]:
    """All but what lies in the cache."""
    return {str(file) for file in folder.rglob("*") if "cache" not in file.parts}


DAMAGE = st.tuples(
    st.lists(st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=9), st.booleans()), max_size=6),
    st.none() | st.floats(0, 1),
)


def damaged(raw: bytes, damage: tuple[list[tuple[float, bytes, bool]], float | None]) -> bytes:
    """Bytes overwritten, or put between others, at places that are shares of the whole; then what is behind one cut off."""
    changes, end = damage
    for share, new, between in changes:
        at = int(share * len(raw))
        raw = raw[:at] + new + raw[at + (0 if between else len(new)) :]
    return raw if end is None else raw[: int(end * len(raw))]

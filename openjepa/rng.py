"""Counter-based random numbers: every draw is a function of (seed, purpose, counter).

Nothing here has a state that outlives a call, so the order in which workers, ranks or
restarts ask changes no number (the determinism contract in docs/architecture.md).
The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood, 2014).
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def key(seed: int, purpose: str) -> int:
    """A 64-bit key for one stream of numbers; also a fit seed for a `torch.Generator`."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Draws:
    """The private streams of several counters (sample slots, steps), drawn side by side.

    Row b belongs to `counters[b]`: its n-th number depends on (seed, purpose, counters[b], n) alone.
    """

    def __init__(self, seed: int, purpose: str, counters: np.ndarray | list[int]) -> None:
        base = np.asarray(counters, dtype=np.uint64)
        self._rows = _mix(_mix(base) ^ np.uint64(key(seed, purpose)))
        self._used = 0

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: np.ndarray) -> "Draws":
        """Some of the rows (indices or a boolean mask), going on where they are."""
        taken = object.__new__(Draws)
        taken._rows, taken._used = self._rows[rows], self._used
        return taken

    def bits(self, *shape: int) -> np.ndarray:
        """The next 64-bit integers of every row. Returns uint64 [rows, *shape]."""
        count = int(np.prod(shape, dtype=np.int64))
        columns = np.arange(self._used, self._used + count, dtype=np.uint64)
        self._used += count
        return _mix(self._rows[:, None] + columns * _GOLDEN).reshape(-1, *shape)

    def uniform(self, *shape: int) -> np.ndarray:
        """The next uniform numbers in [0, 1) of every row. Returns float64 [rows, *shape]."""
        return (self.bits(*shape) >> np.uint64(11)) * 2.0**-53

    def integers(self, high: int | np.ndarray, *shape: int) -> np.ndarray:
        """The next uniform integers in [0, high) of every row. Returns int64 [rows, *shape]."""
        return (self.uniform(*shape) * high).astype(np.int64)


def permutation(seed: int, purpose: str, counter: int, n: int) -> np.ndarray:
    """A uniform permutation of range(n), keyed by (seed, purpose, counter). Returns int64 [n]."""
    return np.argsort(Draws(seed, purpose, [counter]).bits(n)[0], kind="stable")

"""The order of an epoch: which image stands at which place, a function of (seed, purpose, epoch) alone.

Up to LISTED images it is a list. More are not listed: any place is computed when it is asked for, in no memory. A Feistel
network (Luby & Rackoff, 1988) permutes the smallest power of two that holds all images, and a number beyond the last image
is permuted again until it is one ("cycle walking", Black & Rogaway, 2002).
"""

from __future__ import annotations

import numpy as np

from openjepa.rng import Draws, permutation

LISTED = 2**22  # images whose order is a list: 32 MiB a worker
ROUNDS = 8


def epoch_order(seed: int, purpose: str, epoch: int, n: int) -> np.ndarray | Feistel:
    """A permutation of range(n): index it with places, in an array or one by one, for the images there, int64."""
    return permutation(seed, purpose, epoch, n) if n <= LISTED else Feistel(seed, f"{purpose} {epoch}", n)


class Feistel:
    """A permutation of range(n) that no list holds."""

    def __init__(self, seed: int, purpose: str, n: int) -> None:
        self.seed, self.purpose, self.n = seed, purpose, n
        bits = max(2, (n - 1).bit_length())
        self.low_bits = np.uint64(bits // 2)
        self.masks = [np.uint64(2**count - 1) for count in (bits - bits // 2, bits // 2)]  # of the high and low half

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, places: np.ndarray | int) -> np.ndarray:
        """The images at some places, int64 of the same shape."""
        found = self._permute(np.asarray(places, dtype=np.uint64).ravel())
        while (beyond := found >= self.n).any():
            found[beyond] = self._permute(found[beyond])
        return found.astype(np.int64).reshape(np.shape(places))

    def _permute(self, numbers: np.ndarray) -> np.ndarray:
        halves = [numbers >> self.low_bits, numbers & self.masks[1]]
        for i in range(ROUNDS):
            mixed = Draws(self.seed, f"{self.purpose} round {i}", halves[(i + 1) % 2]).bits(1)[:, 0]
            halves[i % 2] = halves[i % 2] ^ (mixed & self.masks[i % 2])
        return (halves[0] << self.low_bits) | halves[1]

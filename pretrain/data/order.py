"""The order of a corpus's windows: in epoch e a permutation keyed by (seed, e), computed one index at a time.

It needs no memory, and is the same for any number of ranks.
"""

import hashlib
import math

import numpy as np


class Permutation:
    """A bijection of [0, n), keyed: a Feistel network of 6 rounds on the next even power of two.

    An index that falls outside [0, n) is sent through again (cycle walking; Black & Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002); less than four times on average. O(1) memory for any n.
    """

    ROUNDS = 6

    def __init__(self, n: int, *key: object) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} things: there must be at least 1")
        self.n = n
        self.half_bits = max(1, math.ceil(max(1, (n - 1).bit_length()) / 2))
        digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8 * self.ROUNDS).digest()
        self.keys = np.frombuffer(digest, ">u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Maps each of the indices [k] to its place, int64 [k]. Raises IndexError for one outside [0, n)."""
        places = np.asarray(indices, np.int64)
        if places.size and not 0 <= places.min() <= places.max() < self.n:
            raise IndexError(f"indices {places.min()} to {places.max()} are not inside [0, {self.n})")
        places = self._encrypt(places)
        while (outside := places >= self.n).any():
            places[outside] = self._encrypt(places[outside])
        return places

    def _encrypt(self, places: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self.half_bits), np.uint64((1 << self.half_bits) - 1)
        left, right = places.astype(np.uint64) >> bits, places.astype(np.uint64) & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << bits | right).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: 64 well-mixed bits. Wraps around."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Order:
    """Which window is sample i of a corpus: f(seed, epoch, index)."""

    def __init__(self, windows: int, seed: int, corpus: str) -> None:
        self.windows, self.seed, self.corpus = windows, seed, corpus

    def __call__(self, first: int, count: int) -> np.ndarray:
        """The windows of the samples [first, first + count), int64."""
        pieces = [np.empty(0, np.int64)]
        while count:
            epoch, index = divmod(first, self.windows)
            n = min(count, self.windows - index)
            pieces.append(Permutation(self.windows, self.seed, self.corpus, epoch)(np.arange(index, index + n)))
            first, count = first + n, count - n
        return np.concatenate(pieces)

"""Order of a corpus's windows: per epoch e, a permutation keyed by (seed, e), computed index by index.

The permutation needs no memory and does not depend on the number of ranks.
"""

import hashlib
import math

import numpy as np


class Permutation:
    """Keyed bijection of [0, n): a Feistel network of 6 rounds on the next even power of two.

    A result outside [0, n) is encrypted again (cycle walking; Black & Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002), on average less than four times. O(1) memory for any n.
    """

    ROUNDS = 6

    def __init__(self, n: int, *key: object) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} items: there must be at least 1")
        self.n = n
        self.half_bits = max(1, math.ceil(max(1, (n - 1).bit_length()) / 2))
        digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8 * self.ROUNDS).digest()
        self.keys = np.frombuffer(digest, ">u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Maps indices [k] to their places, int64 [k]. Raises IndexError if one is outside [0, n)."""
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
    """Finaliser of SplitMix64, modulo 2^64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Order:
    """Maps sample i of a corpus to a window: a function of seed, epoch and index."""

    def __init__(self, windows: int, seed: int, corpus: str) -> None:
        self.windows, self.seed, self.corpus = windows, seed, corpus

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Windows of the samples [first, first + count), int64."""
        pieces = [np.empty(0, np.int64)]
        while count:
            epoch, index = divmod(first, self.windows)
            n = min(count, self.windows - index)
            pieces.append(Permutation(self.windows, self.seed, self.corpus, epoch)(np.arange(index, index + n)))
            first, count = first + n, count - n
        return np.concatenate(pieces)

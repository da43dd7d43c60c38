"""Which corpus sample number i of a run is of: weights, kept as closely as whole samples can, and at any place at once.

Sample i belongs to the corpus in whose share of the circle the point i·φ⁻¹ falls: a Weyl sequence, which spreads more
evenly than any random draw (Kuipers & Niederreiter, "Uniform Distribution of Sequences", 1974). So the corpora of a
batch have nearly their weights' shares, and how many of the first n samples a corpus has is a sum of floors, found in a
few dozen divisions for any n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

CIRCLE = 1 << 63
TURN = 0x4F1BBCDCBFA53E0B  # CIRCLE / φ, odd


@dataclass(frozen=True)
class Blend:
    """weights: of each corpus, from a sample number on; the first number is 0. Only their ratios count."""

    weights: Mapping[int, Sequence[float]]

    def shares(self, sample: int) -> list[float]:
        """Share of each corpus at that sample."""
        weights = self.weights[max(begin for begin in self.weights if begin <= sample)]
        return [weight / sum(weights) for weight in weights]

    def corpora(self, start: int, stop: int) -> np.ndarray:
        """The corpus of each of the samples [start, stop), by its place in the weights."""
        parts = [np.empty(0, np.int64)]
        for first, last, edges in self._stages(start, stop):
            points = np.arange(first, last, dtype=np.uint64) * np.uint64(TURN) % np.uint64(CIRCLE)
            parts.append(np.searchsorted(np.array(edges[1:-1], np.uint64), points, side="right"))
        return np.concatenate(parts)

    def counts(self, start: int, stop: int) -> list[int]:
        """How many of the samples [start, stop) are of each corpus, without looking at them."""
        totals = [0] * len(self.weights[0])
        for first, last, edges in self._stages(start, stop):
            below = [_points_below(edge, last) - _points_below(edge, first) for edge in edges]
            totals = [total + high - low for total, (low, high) in zip(totals, pairwise(below), strict=True)]
        return totals

    def _stages(self, start: int, stop: int) -> list[tuple[int, int, list[int]]]:
        """The stages that samples [start, stop) lie in, with the edges of the corpora's shares of the circle."""
        begins = sorted(self.weights)
        stages = []
        for begin, end in zip(begins, [*begins[1:], stop], strict=True):
            first, last = max(start, begin), min(stop, max(end, begin))
            if first < last:
                sums = [0.0, *accumulate(self.weights[begin])]
                stages.append((first, last, [round(CIRCLE * (at / sums[-1])) for at in sums]))
        return stages


def _points_below(edge: int, n: int) -> int:
    """How many of the first n points lie in [0, edge)."""
    return _floor_sum(n, TURN, CIRCLE, CIRCLE) - _floor_sum(n, TURN, CIRCLE - edge, CIRCLE)


def _floor_sum(n: int, a: int, b: int, m: int) -> int:
    """Σ ⌊(a·i + b) / m⌋ over 0 ≤ i < n, as Euclid divides (Graham, Knuth, Patashnik, "Concrete Mathematics", 3.5)."""
    total = 0
    while n:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        n, b = divmod(top, m)
        a, m = m, a
        if not a:
            break
    return total

"""Blending of corpora: which corpus sample i of a run comes from. Shares follow the weights to within a few samples.

Each corpus owns an arc of a circle, as long as its share. The arc that contains the point i·φ⁻¹ gives the corpus of
sample i. This is a Weyl sequence, which is more even than random draws (Kuipers & Niederreiter, "Uniform Distribution
of Sequences", 1974). The count of a corpus among the first n samples is a sum of floors. It takes a few dozen divisions
for any n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

CIRCLE = 1 << 63
TURN = 0x4F1BBCDCBFA53E0B  # CIRCLE / φ, odd


@dataclass(frozen=True)
class Blend:
    """Blend of corpora. weights: one per corpus, by first sample number, from 0 on; only the ratios matter."""

    weights: Mapping[int, Sequence[float]]

    def shares(self, sample: int) -> list[float]:
        """Share of each corpus at this sample."""
        weights = self.weights[max(begin for begin in self.weights if begin <= sample)]
        return [weight / sum(weights) for weight in weights]

    def corpora(self, start: int, stop: int) -> np.ndarray:
        """Corpus of each sample in [start, stop), as an index into the weights."""
        parts = [np.empty(0, np.int64)]
        for first, last, edges in self._stages(start, stop):
            points = np.arange(first, last, dtype=np.uint64) * np.uint64(TURN) % np.uint64(CIRCLE)
            parts.append(np.searchsorted(np.array(edges[1:-1], np.uint64), points, side="right"))
        return np.concatenate(parts)

    def counts(self, start: int, stop: int) -> list[int]:
        """Number of samples in [start, stop) per corpus, without enumerating them."""
        totals = [0] * len(self.weights[0])
        for first, last, edges in self._stages(start, stop):
            below = [_points_below(edge, last) - _points_below(edge, first) for edge in edges]
            totals = [total + high - low for total, (low, high) in zip(totals, pairwise(below), strict=True)]
        return totals

    def _stages(self, start: int, stop: int) -> list[tuple[int, int, list[int]]]:
        """Stages that overlap samples [start, stop): first and last sample, and the ends of the arcs on the circle."""
        begins = sorted(self.weights)
        stages = []
        for begin, end in zip(begins, [*begins[1:], stop], strict=True):
            first, last = max(start, begin), min(stop, max(end, begin))
            if first < last:
                sums = [0.0, *accumulate(self.weights[begin])]
                stages.append((first, last, [round(CIRCLE * (at / sums[-1])) for at in sums]))
        return stages


def _points_below(edge: int, n: int) -> int:
    """Number of the first n points that lie in [0, edge)."""
    return _floor_sum(n, TURN, CIRCLE, CIRCLE) - _floor_sum(n, TURN, CIRCLE - edge, CIRCLE)


def _floor_sum(n: int, a: int, b: int, m: int) -> int:
    """Returns Σ ⌊(a·i + b) / m⌋ for 0 ≤ i < n.

    Euclid's recursion, as in Graham, Knuth, Patashnik, "Concrete Mathematics", 3.5.
    """
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

"""Samples of a run in order: the corpus and the window of each."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping

import numpy as np

from ..config.lengths import Batches
from .blend import Blend
from .dataset import Windows
from .intervals import Interval, kept, merged
from .order import Order


class Samples:
    """Blended corpora, each in its own order. sources: windows and order per corpus, by title.

    The position of a run is the number of samples consumed per corpus, by `Order.corpus`. Their sum is the number of
    the run's next sample and determines its corpus. The corpus's own count determines the window. So corpora can be
    added, removed or reweighted during a run, and each continues at its own position.

    left_out: intervals [first, stop) of sample numbers that are passed over. They count as consumed, so every other
    sample keeps its number, its corpus and its window.
    """

    def __init__(
        self, sources: dict[str, tuple[Windows, Order]], blend: Blend, left_out: Iterable[Interval] = ()
    ) -> None:
        self.sources, self.blend, self.left_out = sources, blend, merged(left_out)

    def without(self, left_out: Iterable[Interval]) -> "Samples":
        """Returns the samples without these, either."""
        return Samples(self.sources, self.blend, [*self.left_out, *left_out])

    @property
    def remote(self) -> bool:
        """True if a corpus is read from a store."""
        return any(windows.remote for windows, _ in self.sources.values())

    @property
    def seq_len(self) -> int:
        return next(iter(self.sources.values()))[0].seq_len

    def next(self, consumed: Mapping[str, int], count: int) -> list[tuple[Windows, int]]:
        """Returns the next `count` samples: for each, the corpus's windows and the index of the window."""
        found: list[tuple[Windows, int]] = []
        for first, stop in kept(self.left_out, sum(consumed.values()), count):
            found += self._from(self._moved(consumed, first), stop - first)
        return found

    def after(self, consumed: Mapping[str, int], count: int) -> dict[str, int]:
        """Returns the position after the next `count` samples."""
        *_, end = [sum(consumed.values()), *(stop for _, stop in kept(self.left_out, sum(consumed.values()), count))]
        return self._moved(consumed, end)

    def start(self, consumed: Mapping[str, int]) -> int:
        """Returns the number of the next sample. A batch takes the size at this number."""
        return next(kept(self.left_out, sum(consumed.values()), 1))[0]

    def after_steps(self, consumed: Mapping[str, int], steps: int, batches: Batches) -> dict[str, int]:
        """Returns the position after the next `steps` steps."""
        changes = sorted([*(begin for begin, _ in batches.sizes), *(first for first, _ in self.left_out)])
        while steps:  # goes at once to the next change: all steps that begin before it have one size
            start = self.start(consumed)
            size, later = batches.size_at(start), changes[bisect_right(changes, start) :]
            ahead = min(steps, -(-(later[0] - start) // size)) if later else steps
            consumed, steps = self.after(consumed, ahead * size), steps - ahead
        return dict(consumed)

    def numbers(self, consumed: Mapping[str, int], count: int) -> list[int]:
        """Returns the numbers of the next `count` samples."""
        pieces = kept(self.left_out, sum(consumed.values()), count)
        return [number for first, stop in pieces for number in range(first, stop)]

    def _from(self, consumed: Mapping[str, int], count: int) -> list[tuple[Windows, int]]:
        start = sum(consumed.values())
        corpora = self.blend.corpora(start, start + count)
        found = np.empty(count, np.int64)
        for i, (_, order) in enumerate(self.sources.values()):
            mine = corpora == i
            found[mine] = order(consumed.get(order.corpus, 0), int(mine.sum()))
        windows = [windows for windows, _ in self.sources.values()]
        return [(windows[corpus], index) for corpus, index in zip(corpora.tolist(), found.tolist(), strict=True)]

    def _moved(self, consumed: Mapping[str, int], to: int) -> dict[str, int]:
        """Returns the position before sample `to`."""
        counts = self.blend.counts(sum(consumed.values()), to)
        orders = [order for _, order in self.sources.values()]
        added = {order.corpus: consumed.get(order.corpus, 0) + n for order, n in zip(orders, counts, strict=True)}
        return {**consumed, **added}

    def epochs(self, consumed: Mapping[str, int]) -> dict[str, float]:
        """Epochs completed per corpus, by title, as fractions."""
        return {title: consumed.get(order.corpus, 0) / len(windows) for title, (windows, order) in self.sources.items()}

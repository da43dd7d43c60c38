"""Samples of a run in order: the corpus and the window of each."""

from collections.abc import Mapping

import numpy as np

from .blend import Blend
from .dataset import Windows
from .order import Order


class Samples:
    """Blended corpora, each in its own order. sources: windows and order per corpus, by title.

    The position of a run is the number of samples consumed per corpus, by `Order.corpus`. Their sum is the number of
    the run's next sample and determines its corpus. The corpus's own count determines the window. So corpora can be
    added, removed or reweighted during a run, and each continues at its own position.
    """

    def __init__(self, sources: dict[str, tuple[Windows, Order]], blend: Blend) -> None:
        self.sources, self.blend = sources, blend

    @property
    def seq_len(self) -> int:
        return next(iter(self.sources.values()))[0].seq_len

    def next(self, consumed: Mapping[str, int], count: int) -> list[tuple[Windows, int]]:
        """Returns the next `count` samples: for each, the corpus's windows and the index of the window."""
        start = sum(consumed.values())
        corpora = self.blend.corpora(start, start + count)
        found = np.empty(count, np.int64)
        for i, (_, order) in enumerate(self.sources.values()):
            mine = corpora == i
            found[mine] = order(consumed.get(order.corpus, 0), int(mine.sum()))
        windows = [windows for windows, _ in self.sources.values()]
        return [(windows[corpus], index) for corpus, index in zip(corpora.tolist(), found.tolist(), strict=True)]

    def after(self, consumed: Mapping[str, int], count: int) -> dict[str, int]:
        """Returns the position after the next `count` samples."""
        start = sum(consumed.values())
        counts = self.blend.counts(start, start + count)
        orders = [order for _, order in self.sources.values()]
        added = {order.corpus: consumed.get(order.corpus, 0) + n for order, n in zip(orders, counts, strict=True)}
        return {**consumed, **added}

    def epochs(self, consumed: Mapping[str, int]) -> dict[str, float]:
        """Epochs completed per corpus, by title, as fractions."""
        return {title: consumed.get(order.corpus, 0) / len(windows) for title, (windows, order) in self.sources.items()}

"""The samples of a run in their order: which window of which corpus each is."""

from collections.abc import Mapping

import numpy as np

from .blend import Blend
from .dataset import Windows
from .order import Order


class Samples:
    """Blended corpora, each served in an order of its own. `sources`: windows and order of each, by its title.

    Where a run stands is how many samples of each corpus it has consumed, by `Order.corpus`. Their sum says which
    sample of the run is next, and so of which corpus it is; that corpus's own number says which of its windows. So a
    corpus may come, go, or change its weight, and none is rewound.
    """

    def __init__(self, sources: dict[str, tuple[Windows, Order]], blend: Blend) -> None:
        self.sources, self.blend = sources, blend

    @property
    def seq_len(self) -> int:
        return next(iter(self.sources.values()))[0].seq_len

    def next(self, consumed: Mapping[str, int], count: int) -> list[tuple[Windows, int]]:
        """Returns the `count` samples after those consumed: whose window each is, and which."""
        start = sum(consumed.values())
        corpora = self.blend.corpora(start, start + count)
        found = np.empty(count, np.int64)
        for i, (_, order) in enumerate(self.sources.values()):
            mine = corpora == i
            found[mine] = order(consumed.get(order.corpus, 0), int(mine.sum()))
        windows = [windows for windows, _ in self.sources.values()]
        return [(windows[corpus], index) for corpus, index in zip(corpora.tolist(), found.tolist(), strict=True)]

    def after(self, consumed: Mapping[str, int], count: int) -> dict[str, int]:
        """Returns what is consumed once the next `count` samples are."""
        start = sum(consumed.values())
        counts = self.blend.counts(start, start + count)
        orders = [order for _, order in self.sources.values()]
        added = {order.corpus: consumed.get(order.corpus, 0) + n for order, n in zip(orders, counts, strict=True)}
        return {**consumed, **added}

    def epochs(self, consumed: Mapping[str, int]) -> dict[str, float]:
        """How often each corpus has been gone through, by its title."""
        return {title: consumed.get(order.corpus, 0) / len(windows) for title, (windows, order) in self.sources.items()}

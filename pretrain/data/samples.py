"""The samples of a run in their order: which window of which corpus each is."""

from collections.abc import Mapping

from .blend import Blend
from .dataset import Order, Windows


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
        """Of the `count` samples after those consumed: whose window it is, and which."""
        start = sum(consumed.values())
        sources = list(self.sources.values())
        places = [consumed.get(order.corpus, 0) for _, order in sources]
        found = []
        for corpus in self.blend.corpora(start, start + count).tolist():
            windows, order = sources[corpus]
            found.append((windows, order(places[corpus])))
            places[corpus] += 1
        return found

    def after(self, consumed: Mapping[str, int], count: int) -> dict[str, int]:
        """What is consumed once those samples are."""
        start = sum(consumed.values())
        counts = self.blend.counts(start, start + count)
        orders = [order for _, order in self.sources.values()]
        added = {order.corpus: consumed.get(order.corpus, 0) + n for order, n in zip(orders, counts, strict=True)}
        return {**consumed, **added}

    def epochs(self, consumed: Mapping[str, int]) -> dict[str, float]:
        """How often each corpus has been gone through, by its title."""
        return {title: consumed.get(order.corpus, 0) / len(windows) for title, (windows, order) in self.sources.items()}

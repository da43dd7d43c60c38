"""Token files in, batches out: a pure function of seed and sample number. Only loader.py imports torch."""

from .dataset import IGNORED, Corpus, Data, Window, Windows, open_corpus, open_data
from .order import Order, Permutation
from .packing import PackedWindows
from .samples import Samples

__all__ = [
    "IGNORED",
    "Corpus",
    "Data",
    "Order",
    "PackedWindows",
    "Permutation",
    "Samples",
    "Window",
    "Windows",
    "open_corpus",
    "open_data",
]

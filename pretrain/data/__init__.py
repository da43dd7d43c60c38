"""Token files in, batches out: a pure function of seed and sample number."""

from .dataset import IGNORED, Corpus, Data, Window, Windows, open_corpus, open_data
from .loader import Batch, BatchLoader, MicroBatch, validation_batches
from .order import Order, Permutation
from .packing import PackedWindows
from .samples import Samples

__all__ = [
    "IGNORED",
    "Batch",
    "BatchLoader",
    "Corpus",
    "Data",
    "MicroBatch",
    "Order",
    "PackedWindows",
    "Permutation",
    "Samples",
    "Window",
    "Windows",
    "open_corpus",
    "open_data",
    "validation_batches",
]

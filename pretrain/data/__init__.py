"""Token files in, batches out: a pure function of seed and sample number."""

from .dataset import IGNORED, Corpus, DataConfig, Order, Permutation, Window, Windows, open_corpus
from .loader import Batch, BatchLoader, MicroBatch, validation_batches

__all__ = [
    "IGNORED",
    "Batch",
    "BatchLoader",
    "Corpus",
    "DataConfig",
    "MicroBatch",
    "Order",
    "Permutation",
    "Window",
    "Windows",
    "open_corpus",
    "validation_batches",
]

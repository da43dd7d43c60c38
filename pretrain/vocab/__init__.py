"""The vocabulary-parallel matrix for a library user; the rest is in the modules. Imports torch alone."""

from .embedding import VocabConfig, VocabParallelEmbedding
from .loss import VocabLoss, vocab_parallel_linear_cross_entropy
from .shard import VocabShard

__all__ = [
    "VocabConfig",
    "VocabLoss",
    "VocabParallelEmbedding",
    "VocabShard",
    "vocab_parallel_linear_cross_entropy",
]

"""The vocabulary-parallel matrix for a library user, see docs/library.md; the rest is in the modules.

Imports torch alone.
"""

from ..config.vocab import VocabConfig
from .embedding import VocabParallelEmbedding
from .gradients import clip_grad_norm_, summed
from .loss import VocabLoss, vocab_parallel_linear_cross_entropy
from .shard import VocabShard

__all__ = [
    "VocabConfig",
    "VocabLoss",
    "VocabParallelEmbedding",
    "VocabShard",
    "clip_grad_norm_",
    "summed",
    "vocab_parallel_linear_cross_entropy",
]

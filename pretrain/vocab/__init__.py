"""The matrix split by vocabulary rows, for a library user: see docs/library.md. Further functions are in the modules.

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

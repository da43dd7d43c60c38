"""The vocabulary-parallel matrix: its owners, lookup, loss, readout and sampling. Imports torch alone."""

from .collectives import on_host
from .embedding import VocabConfig, VocabParallelEmbedding
from .lookup import LookupPlan, LookupTraffic, plan_lookup, vocab_parallel_lookup
from .loss import VocabLoss, vocab_parallel_linear_cross_entropy
from .parallel import Machine, Parallel, Transfer, Workload, choose_parallel
from .readout import Reading, Readout
from .sampling import check_sampling, sample
from .shard import VocabShard, seeded_normal, stable_seed

__all__ = [
    "LookupPlan",
    "LookupTraffic",
    "Machine",
    "Parallel",
    "Reading",
    "Readout",
    "Transfer",
    "VocabConfig",
    "VocabLoss",
    "VocabParallelEmbedding",
    "VocabShard",
    "Workload",
    "check_sampling",
    "choose_parallel",
    "on_host",
    "plan_lookup",
    "sample",
    "seeded_normal",
    "stable_seed",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_lookup",
]

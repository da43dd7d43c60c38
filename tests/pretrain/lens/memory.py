"""Measures the memory of the lens at a large vocabulary, beyond the model: prints the growth of the peak in MiB.

`python -m tests.pretrain.lens.memory [LAYERS POSITIONS]`; 48 layers × 1,024 positions would be 25 GB of logits.
"""

import resource
import sys

import torch

from pretrain.families.gpt2 import GPT2Config
from pretrain.lens.lens import run_lens
from pretrain.lens.method import Method
from pretrain.vocab import VocabConfig, VocabParallelEmbedding, VocabShard
from tests.benchmarks.measure import free_at_once

VOCAB, WIDTH, BUDGET_MIB = 128_000, 32, 64


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(layers: int, positions: int) -> float:
    free_at_once()
    torch.manual_seed(0)
    body = GPT2Config(layers=layers, width=WIDTH, heads=2, context=positions).body()
    for parameter in body.parameters():
        parameter.data.normal_(0, 0.3)
    vocab = VocabParallelEmbedding(VocabConfig(), VocabShard.of(0, 1, VOCAB), WIDTH, seed=0)
    tokens = torch.randint(VOCAB, (1, positions + 1))

    def take(n: int, memory_mib: int) -> None:
        parts = tokens[:, :n], tokens[:, 1 : n + 1]
        run_lens(vocab, body, body, *parts, Method(), k=5, memory_mib=memory_mib)

    take(1, 1)  # memory that torch takes at its first computation
    before = peak_mib()
    take(positions, BUDGET_MIB)
    return peak_mib() - before


if __name__ == "__main__":
    print(round(measure(*map(int, sys.argv[1:] or (3, 128))), 1))

"""Operations that a block recomputes in the backward. That results do not change is tested with the engines."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.engine.activations import EXPENSIVE, checkpoint_activations
from pretrain.families.gpt2 import GPT2Config
from pretrain.models.gpt2 import Block


class Count(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))


def calls_of(kind: str) -> tuple[int, int]:
    """Counts matmuls and attentions, and GELUs, of one forward and backward."""
    block = Block(GPT2Config(layers=1, width=24, heads=3, context=8))
    names = [name for name, _ in block.named_parameters()]
    checkpoint_activations([block], kind)
    assert [name for name, _ in block.named_parameters()] == names
    hidden = torch.randn(2, 8, 24, requires_grad=True)
    with Count() as count:
        block(hidden, None).sum().backward()
    return sum(count.calls[operation] for operation in EXPENSIVE), count.calls[torch.ops.aten.gelu.default]


@pytest.mark.parametrize("kind,expensive,cheap", [("none", 0, 0), ("block", 4, 1), ("selective", 0, 1)])
def test_checkpointing_recomputes_expected_operations(kind, expensive, cheap):
    """Block checkpointing repeats four of five matmuls and attentions: no gradient needs the last result."""
    before, gelu = calls_of("none")
    assert calls_of(kind) == (before + expensive, gelu + cheap)

"""Collectives may start as late as their `wait`: results keep every bit.

gloo starts a collective at once, on the CPU. NCCL starts it when the GPU has come that far, while Python is far ahead.
So Python must not change an input, or use a result, between the call and `wait`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config.job import JobConfig
from pretrain.vocab import VocabShard, collectives, loss, vocab_parallel_linear_cross_entropy
from tests.pretrain.helpers import make_corpus, padded_rows
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank
from tests.ranks import run_ranks

VOCAB, WIDTH, TOKENS = 300, 16, (40, 33)
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"scale": 0.5},
    "of each token": {"reduction": "none", "label_smoothing": 0.1},
    "smoothed softcap": {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01},
}


class LateWork:
    """A collective that starts when somebody waits for it."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self.start: Callable[[], Any] | None = start

    def wait(self) -> None:
        start, self.start = self.start, None
        if start is not None:
            start()


@contextlib.contextmanager
def late() -> Iterator[list[LateWork]]:
    """Delays the collectives of the matrix that nobody waits for at once. Yields them."""
    works: list[LateWork] = []

    def delayed(collective: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        def call(first: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if not async_op:
                return collective(first, *args, **kwargs)
            if writes:
                first.fill_(torch.nan if first.is_floating_point() else -1)  # there before the collective has run
            works.append(LateWork(lambda: collective(first, *args, **kwargs)))
            return works[-1]

        return call

    with contextlib.ExitStack() as stack:
        for name in ("_all_gather", "_reduce_scatter"):
            stack.enter_context(mock.patch.object(collectives, name, delayed(getattr(collectives, name), writes=True)))
        stack.enter_context(mock.patch.object(dist, "all_reduce", delayed(dist.all_reduce, writes=False)))
        yield works
    assert all(work.start is None for work in works), "nobody waited for a collective"


def results(rank: int, world: int, tokens: str, options: dict[str, Any]) -> list[Tensor]:
    """Returns loss, its statistics and both gradients of this rank, of several chunks."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=generator)
    hidden_pND = torch.randn(world, max(TOKENS), WIDTH, generator=generator)
    targets_pN = torch.randint(VOCAB, (world, max(TOKENS)), generator=generator)
    shard = VocabShard.of(rank, world, VOCAB, 1)
    whose, count = (rank, TOKENS[rank]) if tokens == "distinct" else (0, TOKENS[0])
    hidden_ND = hidden_pND[whose, :count].clone().requires_grad_()
    weight_vD = padded_rows(weight_VD, shard).requires_grad_()
    out = vocab_parallel_linear_cross_entropy(
        hidden_ND,
        weight_vD,
        targets_pN[whose, :count],
        shard=shard,
        group=dist.group.WORLD,
        tokens=tokens,  # type: ignore[arg-type]
        chunk_tokens=24,
        **options,
    )
    out.loss.sum().backward()
    assert hidden_ND.grad is not None and weight_vD.grad is not None and out.entropy is not None
    return [out.loss.detach(), out.lse, out.entropy, hidden_ND.grad, weight_vD.grad]


def both(rank: int, world: int, tokens: str, options: dict[str, Any]) -> tuple[bool, int]:
    """Returns True if late collectives give the same bits, and how many there were."""
    early = results(rank, world, tokens, options)
    with late() as works:
        found = results(rank, world, tokens, options)
    return all(map(torch.equal, early, found)), len(works)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("tokens", ["distinct", "replicated"])
def test_loss_and_gradients_keep_every_bit(tokens, options):
    for same, delayed in run_ranks(2, both, tokens, options, timeout=120):
        assert same and delayed >= 4


def train_twice(rank: int, world: int, early: JobConfig, delayed: JobConfig) -> int:
    """Trains early, then with late collectives, with chunks of 32 tokens. Returns how many collectives were late."""
    with mock.patch.object(loss, "chunk_budget", lambda *args: 32):
        train_rank(rank, world, early)
        with late() as works:
            train_rank(rank, world, delayed)
    return len(works)


def test_training_keeps_every_bit(tmp_path):
    """Two steps with FSDP2, evaluation, and the monitors."""
    corpus = make_corpus(tmp_path / "corpus")
    changes = {"vocab__size": None, "train__steps": 2, "monitor": {"embedding_every": 2, "lens_every": 2}}
    configs = [tiny_config(corpus, tmp_path / name, **changes) for name in ("early", "late")]
    assert min(run_ranks(2, train_twice, *configs, timeout=120)) > 20
    early, delayed = (saved_tensors(tmp_path / name) for name in ("early", "late"))
    assert early.keys() == delayed.keys()
    assert all(torch.equal(early[name], delayed[name]) for name in early)

"""The sharded loss on one to four ranks against a dense float64 truth."""

import random

import pytest

from tests.pretrain.vocab.oracle import OPTIONS, Case, check, rank_losses
from tests.ranks import run_ranks

REDUCTIONS = [("sum", "one"), ("sum", "rank"), ("none", "token")]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_distinct_tokens(world):
    counts = (7, 12, 0, 5)[:world]  # unequal, one rank without any
    check(world, *(Case(counts, reduction=r, factor=f, options=o) for r, f in REDUCTIONS for o in OPTIONS.values()))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_replicated_tokens(world):
    kinds = [("sum", "one"), ("none", "token")]
    cases = (
        Case((13,), tokens="replicated", reduction=r, factor=f, options=o) for r, f in kinds for o in OPTIONS.values()
    )
    check(world, *cases)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_main_gradient_is_complete_after_forward(world):
    counts = (7, 12, 0)[:world]
    check(world, *(Case(counts, main_grad=True, options=o) for o in OPTIONS.values()))


@pytest.mark.parametrize("world", [2, 4])
def test_ignored_targets_and_ranks_without_tokens(world):
    counts = (6, 9, 4, 3)[:world]
    kinds = ("none", "some", "first rank", "all")
    cases = [Case(counts, ignored=kind, reduction=r, options=OPTIONS["all"]) for kind in kinds for r in ("sum", "none")]
    check(world, *cases)


def test_a_group_without_any_token():
    cases = [Case((0, 0)), Case((0, 0), reduction="none"), Case((0, 0), main_grad=True)]
    for results in run_ranks(2, rank_losses, cases):
        for result in results:
            assert result["loss"].sum() == 0 and result["n_tokens"] == 0
            assert len(result["dhidden"]) == 0 and (result["dweight"] == 0).all()


def test_short_and_empty_shards():
    sizes = [(5, 1), (3, 1), (3, 8), (130, 128)]
    cases = [
        Case((3, 2, 4, 1), vocab_size=v, multiple=m, ignored="none", tokens=t, reduction=r, options=o)
        for v, m in sizes
        for o in (OPTIONS["plain"], OPTIONS["all"])
        for t, r in (("distinct", "sum"), ("distinct", "none"))
    ]
    check(4, *cases)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_problem_on_several_ranks(world):
    """Cases drawn at random, the same on all ranks."""
    draw = random.Random(world)
    cases = [
        Case(
            counts=(draw.randint(1, 12), *(draw.randint(0, 12) for _ in range(world - 1))),
            vocab_size=draw.randint(1, 60),
            multiple=draw.choice([1, 2, 8, 16]),
            ignored=draw.choice(["none", "some", "first rank", "all"]),
            reduction=draw.choice(["sum", "none"]),
            chunk_tokens=draw.randint(1, 40),
            options=draw.choice(list(OPTIONS.values())),
        )
        for _ in range(40)
    ]
    check(world, *cases)

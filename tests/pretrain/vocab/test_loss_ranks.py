"""The sharded loss on one to four ranks against a dense float64 truth."""

import random

import pytest

from tests.pretrain.vocab.oracle import OPTIONS, Case, check, rank_losses
from tests.ranks import run_ranks

REDUCTIONS = [("sum", "one"), ("sum", "rank"), ("none", "token")]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_distinct_tokens_match_dense(world):
    counts = (7, 12, 0, 5)[:world]  # unequal; one rank has none
    check(world, *(Case(counts, reduction=r, factor=f, options=o) for r, f in REDUCTIONS for o in OPTIONS.values()))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_replicated_tokens_match_dense(world):
    kinds = [("sum", "one"), ("none", "token")]
    cases = (
        Case((13,), tokens="replicated", reduction=r, factor=f, options=o) for r, f in kinds for o in OPTIONS.values()
    )
    check(world, *cases)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", ["distinct", "replicated"])
def test_main_gradient_is_complete_after_forward(world, tokens):
    counts = (7, 12, 0, 5)[:world] if tokens == "distinct" else (13,)
    check(world, *(Case(counts, tokens=tokens, main_grad=True, options=o) for o in OPTIONS.values()))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_ignored_targets_and_empty_ranks_match_dense(world, options):
    cases = [
        Case(counts[:world], ignored=kind, reduction=reduction, options=OPTIONS[options])
        for counts in ((6, 9, 4, 3), (0, 9, 4, 3))
        for kind in ("none", "some", "first rank", "all")
        for reduction in ("sum", "none")
    ]
    check(world, *cases)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ignore_index_may_be_a_row(world):
    counts = (7, 12, 5)[:world]
    check(world, *(Case(counts, ignore_index=3, vocab_size=6, options=o) for o in OPTIONS.values()))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_logits_of_ten_thousands_match_dense(world):
    """One shard's largest logit may be 1e4 below another's: nothing overflows and nothing is lost."""
    counts = (7, 12, 0, 5)[:world]
    check(world, *(Case(counts, size=size, options=o) for size in (1e4, -1e4) for o in OPTIONS.values()))


def test_group_without_tokens_has_zero_loss():
    cases = [Case((0, 0)), Case((0, 0), reduction="none"), Case((0, 0), main_grad=True)]
    for results in run_ranks(2, rank_losses, cases):
        for result in results:
            assert result["loss"].sum() == 0 and result["n_tokens"] == 0
            assert len(result["dhidden"]) == 0 and (result["dweight"] == 0).all()


def test_short_and_empty_shards_match_dense():
    sizes = [(5, 1), (3, 1), (3, 8), (130, 128)]
    cases = [
        Case((3, 2, 4, 1), vocab_size=v, multiple=m, ignored="none", tokens=t, reduction=r, options=o)
        for v, m in sizes
        for o in (OPTIONS["plain"], OPTIONS["all"])
        for t, r in (("distinct", "sum"), ("distinct", "none"), ("replicated", "sum"))
    ]
    check(4, *cases)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_random_problems_match_dense_on_several_ranks(world):
    """Random cases, the same on all ranks."""
    draw = random.Random(world)

    def kind() -> dict:
        if draw.random() < 0.3:
            return {"tokens": "replicated", "counts": (draw.randint(1, 30),), "main_grad": draw.random() < 0.5}
        counts = (draw.randint(1, 12), *(draw.randint(0, 12) for _ in range(world - 1)))
        reduction, factor = draw.choice(REDUCTIONS)
        main_grad = factor == "one" and draw.random() < 0.5
        return {"counts": counts, "reduction": reduction, "factor": factor, "main_grad": main_grad}

    cases = [
        Case(
            **kind(),
            vocab_size=draw.randint(1, 60),
            multiple=draw.choice([1, 2, 8, 16]),
            ignored=draw.choice(["none", "some", "first rank", "all"]),
            size=draw.choice([1.0, 30.0]),
            chunk_tokens=draw.randint(1, 40),
            options=draw.choice(list(OPTIONS.values())),
        )
        for _ in range(40)
    ]
    check(world, *cases)

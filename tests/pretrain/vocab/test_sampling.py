"""Sampling on the shards: the same ids for every split, and the distribution that was asked for."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.vocab import VocabShard, sampling
from pretrain.vocab.sampling import _gumbel, _keep_top_k, _Nucleus, check_sampling, sample
from tests.benchmarks.measure import extra_peak_mib, free_at_once
from tests.pretrain.helpers import padded_rows
from tests.ranks import in_fork, run_ranks

WIDTH = 6
SETTINGS: list[dict] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "softcap": 2.0},
    {"temperature": 2.0, "top_k": 4},
    {"top_k": 1},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.6, "softcap": 2.0},
]
VOCABULARIES = [(37, 4), (5, 1)]  # uneven; one empty shard on four ranks


def problem(vocab_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    return torch.randn(24, WIDTH, generator=generator), torch.randn(vocab_size, WIDTH, generator=generator)


def rank_samples(rank, world, score_bytes=sampling.SCORE_BYTES):
    """The ids of all settings, [settings, N], for each vocabulary."""
    sampling.SCORE_BYTES = score_bytes
    results = []
    for vocab_size, multiple in VOCABULARIES:
        hidden, weight = problem(vocab_size)
        shard = VocabShard.of(rank, world, vocab_size, multiple)
        place = {"shard": shard, "group": dist.group.WORLD, "seed": 3, "draw": 5}
        rows = padded_rows(weight, shard)
        results.append(torch.stack([sample(hidden, rows, **place, **setting) for setting in SETTINGS]))
    return results


def test_ids_are_equal_for_every_split():
    (whole,) = run_ranks(1, rank_samples)
    for ids, (vocab_size, _) in zip(whole, VOCABULARIES, strict=True):
        assert (ids >= 0).all() and (ids < vocab_size).all()
    for world in (2, 3, 4):
        for ids in run_ranks(world, rank_samples):
            assert all(map(torch.equal, ids, whole))


def test_ids_are_equal_for_any_number_of_positions_at_once():
    (whole,) = run_ranks(1, rank_samples)
    for world, score_bytes in ((1, 1), (2, 8 * 20 * 7)):  # one position; seven, or more of the small vocabulary
        for ids in run_ranks(world, rank_samples, score_bytes):
            assert all(map(torch.equal, ids, whole))


def peak_of_a_long_text() -> float:
    """Returns the peak in MiB. Dense scores of 128 positions would be 100 MiB, and each result of them as much."""
    free_at_once()
    weight, hidden = torch.randn(100_000, 64).bfloat16(), torch.randn(128, 64)
    shard = VocabShard.of(0, 1, len(weight), 1)
    return extra_peak_mib(lambda: sample(hidden, weight, shard=shard, seed=0, draw=0, top_k=50))


def test_memory_stays_bounded():
    assert in_fork(peak_of_a_long_text) < 6 * sampling.SCORE_BYTES / 2**20


def alone(logits: list[float], N: int = 1, **settings) -> Tensor:
    """Draws N ids with these logits."""
    weight = torch.tensor([[logit] for logit in logits])
    settings = {"seed": 0, "draw": 0} | settings
    return sample(torch.ones(N, 1), weight, shard=VocabShard.of(0, 1, len(logits), 1), **settings)


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"top_k": 1}], ids=["temperature 0", "top_k 1"])
def test_greedy_takes_the_largest_logit_and_lowest_id(setting):
    assert alone([1, 3, 2, 3, 3], 50, **setting).tolist() == [1] * 50


def rank_ties(rank, world):
    shard = VocabShard.of(rank, world, 6, 1)
    rows = padded_rows(torch.tensor([[0.0], [2.0], [1.0], [2.0], [1.0], [2.0]]), shard)
    place = {"shard": shard, "group": dist.group.WORLD, "seed": 0, "draw": 0}
    hidden = torch.ones(300, 1)
    return [
        sample(hidden, rows, **place, **s).unique().tolist() for s in ({"temperature": 0.0}, {"top_k": 2}, {"top_k": 4})
    ]


def test_ties_across_shards_go_to_the_lowest_ids():
    for ids in run_ranks(3, rank_ties):
        assert ids == [[1], [1, 3], [1, 2, 3, 5]]


SCORES = st.lists(st.integers(-12, 12).map(lambda x: x / 3), min_size=1, max_size=30)  # many ties


@settings(deadline=None)
@given(scores=SCORES, k=st.integers(1, 29))
def test_top_k_keeps_exactly_k(scores, k):
    k = min(k, len(scores))
    row = torch.tensor([scores], dtype=torch.float64)
    shard = VocabShard.of(0, 1, len(scores), 1)
    kept = (_keep_top_k(row, k, shard, None) > -torch.inf).squeeze(0).nonzero().flatten()
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    assert kept.tolist() == sorted(best)


@settings(deadline=None)
@given(scores=SCORES, top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_is_enough(scores, top_p):
    row = torch.tensor([scores], dtype=torch.float64)
    nucleus = _Nucleus(row, top_p, None)
    kept = ~torch.stack([nucleus.outside(torch.tensor([[score]])) for score in row[0]]).squeeze(1)
    probabilities = row.softmax(1).squeeze(0)
    assert probabilities[kept].sum() >= top_p - 1e-12
    edge = probabilities[kept].min()
    assert (probabilities[~kept] < edge).all()  # the largest, and all ties at the edge
    assert probabilities[probabilities > edge].sum() < top_p + 1e-12  # without the edge it is not enough


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.95])
def test_top_p_draws_the_largest_noisy_score_of_those_kept(top_p):
    hidden, weight = problem(VOCABULARIES[0][0])
    scores = hidden.double() @ weight.double().T
    probabilities, order = scores.softmax(1).sort(descending=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, probabilities.cumsum(1) - probabilities < top_p)
    noisy = scores + _gumbel(3, 5, torch.arange(len(hidden)), torch.arange(len(weight)))
    if top_p < 0.9:  # without top_p, other ids are drawn
        assert not kept.gather(1, noisy.argmax(1, keepdim=True)).all()
    shard = VocabShard.of(0, 1, *VOCABULARIES[0])
    ids = sample(hidden, padded_rows(weight, shard), shard=shard, seed=3, draw=5, top_p=top_p)
    assert torch.equal(ids, noisy.masked_fill(~kept, -torch.inf).argmax(1))


def test_top_p_applies_after_top_k():
    # e^3, e^2, e^1, e^0: the first two are 73% and 27% of what top_k=2 keeps, 64% and 24% of everything
    assert alone([3, 2, 1, 0], 500, top_k=2, top_p=0.7).unique().tolist() == [0]
    assert alone([3, 2, 1, 0], 500, top_p=0.7).unique().tolist() == [0, 1]


CHI_SQUARE_999 = {3: 16.27, 4: 18.47, 9: 27.88}  # the 99.9% quantile by degrees of freedom


def assert_frequencies(ids: Tensor, logits: list[float], kept: int) -> None:
    """Pearson's test of the ids against the softmax of the `kept` largest logits, which rise."""
    dropped = len(logits) - kept
    counts = ids.bincount(minlength=len(logits))
    expected = len(ids) * torch.tensor(logits[dropped:], dtype=torch.float64).softmax(0)
    assert (counts[:dropped] == 0).all()
    assert ((counts[dropped:] - expected).square() / expected).sum() < CHI_SQUARE_999[kept - 1]


@pytest.mark.parametrize(
    "setting,kept",
    [({}, 10), ({"temperature": 0.5}, 10), ({"temperature": 2.0, "top_k": 5}, 5), ({"top_p": 0.55}, 4)],
    ids=["plain", "temperature", "top_k", "top_p"],
)
def test_frequencies_match_the_softmax(setting, kept):
    logits = [0.2 * i for i in range(10)]
    scaled = [logit / setting.get("temperature", 1.0) for logit in logits]
    assert_frequencies(alone(logits, 20_000, **setting), scaled, kept)


@pytest.mark.parametrize("many", ["seed", "draw"])
def test_neighbouring_seeds_and_draws_are_independent(many):
    logits = [0.2 * i for i in range(10)]
    assert_frequencies(torch.cat([alone(logits, **{many: i}) for i in range(2000)]), logits, 10)


def test_only_seed_and_draw_change_the_ids():
    logits = [0.0] * 1000
    first = alone(logits, 8)
    assert torch.equal(first, alone(logits, 8)) and torch.equal(first[:3], alone(logits, 3))
    assert len({tuple(ids.tolist()) for ids in (first, alone(logits, 8, seed=1), alone(logits, 8, draw=1))}) == 3


@pytest.mark.parametrize("logits", [[1e4, 0.0, -1e4], [-1e4, -1e4 - 1, -2e4]])
def test_extreme_logits_are_sampled_without_nan(logits):
    assert alone(logits, 20, top_p=0.5).tolist() == [0] * 20


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be 0 \(the most likely token\), or a number of at least 1e-06"),
        ({"temperature": 1e-308}, "temperature=1e-308 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": float("inf")}, "temperature=inf must be 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
    ],
)
def test_error_names_a_wrong_setting(setting, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(**({"temperature": 1.0, "top_k": None, "top_p": 1.0} | setting))

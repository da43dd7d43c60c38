"""Measures read on the shards, against a dense float64 computation."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pretrain.vocab import VocabShard
from pretrain.vocab.readout import Readout
from pretrain.vocab.softmax import ShardSoftmax, dot
from tests.pretrain.helpers import padded_rows
from tests.ranks import run_ranks

WIDTH, SETS, REFERENCES, K = 6, 3, 2, 4
NEAR = {"rtol": 1e-10, "atol": 1e-10}
# vocabulary, multiple, softcap, ties: uneven shards; one empty shard on four ranks; ties
CASES = [(37, 4, None, False), (37, 4, 1.5, False), (5, 1, None, False), (37, 4, None, True), (9, 8, None, True)]


def problem(vocab_size: int, ties: bool, dtype: torch.dtype = torch.float64):
    """Hidden [S, N, D], references [R, N, D], weight [V, D], ids [N, J], marks [V]. With ties: small whole numbers."""
    generator = torch.Generator().manual_seed(vocab_size + ties)

    def numbers(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (drawn.round() if ties else drawn).to(dtype)

    hidden, references, weight = numbers(SETS, 23, WIDTH), numbers(REFERENCES, 23, WIDTH), numbers(vocab_size, WIDTH)
    ids = torch.randint(vocab_size, (23, 2), generator=generator)
    ids[::5, 1] = -100
    return hidden, references, weight, ids, torch.rand(vocab_size, generator=generator) < 0.4


def dense(hidden: Tensor, references: Tensor, weight: Tensor, ids: Tensor, marks: Tensor, softcap, k: int) -> dict:
    """Computes the fields of `Reading` from materialised logits."""

    def logits_of(states: Tensor) -> Tensor:
        logits = states.double() @ weight.double().T
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    logits, others = logits_of(hidden), logits_of(references)
    log_p, log_q = logits.log_softmax(-1), others.log_softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    places = order.argsort(-1) + 1
    known = ids >= 0
    where = ids.clamp(min=0).expand(len(logits), -1, -1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1)

    pairs = [[(kl(q, p), kl(p, q)) for q in log_q] for p in log_p]
    return {
        "top_logits": logits.gather(-1, order[..., :k]),
        "top_ids": order[..., :k],
        "lse": logits.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logits": torch.where(known, logits.gather(-1, where), math.nan),
        "ranks": torch.where(known, places.gather(-1, where), 0),
        "kl_from": torch.stack([torch.stack([pair[0] for pair in both], -1) for both in pairs]),
        "kl_to": torch.stack([torch.stack([pair[1] for pair in both], -1) for both in pairs]),
        "mass": (log_p.exp() * marks).sum(-1),
    }


def slice_of(rank: int, world: int, tokens: str) -> slice:
    """Reads on one rank. With distinct tokens ranks have different numbers of them, and the last of four has none."""
    if tokens == "replicated":
        return slice(None)
    edges = [0, 14, 20, 23, 23] if world == 4 else [0, *([14, 20] if world == 3 else [14])[: world - 1], 23]
    return slice(edges[rank], edges[rank + 1])


def rank_readings(rank, world, tokens):
    results = []
    for vocab_size, multiple, softcap, ties in CASES:
        hidden, references, weight, ids, marks = problem(vocab_size, ties)
        shard, mine = VocabShard.of(rank, world, vocab_size, multiple), slice_of(rank, world, tokens)
        readout = Readout(
            padded_rows(weight, shard),
            shard=shard,
            group=dist.group.WORLD,
            softcap=softcap,
            tokens=tokens,
            memory_mib=0.005,  # chunks of a few tokens
        )
        marked = padded_rows(marks[:, None], shard)[:, 0]
        read = readout.read(hidden[:, mine], k=K, ids_NJ=ids[mine], reference_RND=references[:, mine], mask_v=marked)
        results.append(vars(read))
    return results


@pytest.mark.parametrize("tokens", ["replicated", "distinct"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_measures_match_dense(world, tokens):
    results = run_ranks(world, rank_readings, tokens)
    for i, (vocab_size, _, softcap, ties) in enumerate(CASES):
        truth = dense(*problem(vocab_size, ties), softcap, K)
        for rank in range(world):
            mine = slice_of(rank, world, tokens)
            for name, value in truth.items():
                note = {"msg": lambda text, at=(rank, CASES[i], name): f"{at}: {text}"}
                assert_close(results[rank][i][name], value[:, mine], **NEAR, equal_nan=True, **note)


def alone(weight: Tensor, **settings) -> Readout:
    return Readout(weight, shard=VocabShard.of(0, 1, len(weight), 1), **settings)


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12).map(lambda x: x / 3), min_size=1, max_size=30),
    k=st.integers(0, 30),
    data=st.data(),
)
def test_top_k_and_rank_agree_on_ties(logits, k, data):
    """Top-k and rank are two views of one order."""
    k, id = min(k, len(logits)), data.draw(st.integers(0, len(logits) - 1))
    readout, one = alone(torch.tensor([[x] for x in logits], dtype=torch.float64)), torch.ones(1, 1).double()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert readout.top_k(one, k)[1].tolist() == [order[:k]]
    assert readout.rank(one, torch.tensor([id])).tolist() == [order.index(id) + 1]


def test_single_measures_match_dense():
    hidden, references, weight, ids, marks = problem(37, False)
    truth = dense(hidden, references, weight, ids, marks, None, K)
    readout, states = alone(weight), hidden[1]
    for value, name in [
        (readout.log_sum_exp(states), "lse"),
        (readout.entropy(states), "entropy"),
        (readout.masked_mass(states, marks), "mass"),
    ]:
        assert_close(value, truth[name][1], **NEAR)
    assert_close(readout.logit(states, ids[:, 0]), truth["logits"][1, :, 0], **NEAR)
    assert_close(readout.rank(states, ids[:, 0]), truth["ranks"][1, :, 0])
    for value, name in zip(readout.kl(references[0], states), ("kl_from", "kl_to"), strict=True):
        assert_close(value, truth[name][1, :, 0], **NEAR)
    values, chosen = readout.top_k(states, K)
    assert_close(values, truth["top_logits"][1], **NEAR)
    assert torch.equal(chosen, truth["top_ids"][1])


@pytest.mark.parametrize("states,rows", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_low_precision_is_read_accurately(states, rows):
    """Results are as exact as the rounded inputs allow."""
    hidden, references, weight, ids, marks = problem(37, False)
    hidden, references = hidden.to(getattr(torch, states)), references.to(getattr(torch, states))
    weight = weight.to(getattr(torch, rows))
    read = vars(alone(weight).read(hidden, k=K, ids_NJ=ids, reference_RND=references, mask_v=marks))
    truth = dense(hidden, references, weight, ids, marks, None, K)
    for name, value in truth.items():
        if name not in ("top_ids", "ranks"):  # ties of rounded numbers
            assert read[name].dtype == torch.float32
            assert_close(read[name].double(), value, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_extreme_logits_match_dense():
    """Logits far beyond the range of exp, and equal distributions."""
    readout = alone(torch.tensor([[1e4], [0.0], [-1e4]]))
    one = torch.ones(2, 1)
    assert readout.entropy(one).tolist() == [0, 0] and readout.log_sum_exp(one).tolist() == [1e4, 1e4]
    assert [x.tolist() for x in readout.kl(one, one)] == [[0, 0], [0, 0]]
    there, back = readout.kl(one, -one)
    assert there.tolist() == back.tolist() == [2e4, 2e4]


def test_diverged_model_is_read_without_an_error():
    read = alone(torch.randn(7, 2)).read(torch.full((1, 3, 2), math.nan), k=2, ids_NJ=torch.zeros(3, 1).long())
    assert read.top_ids.tolist() == [[[0, 1]] * 3] and read.lse.isnan().all()


def top_of_a_broken_matrix(rank: int, world: int) -> list[list[int]]:
    shard = VocabShard.of(rank, world, 7, 1)
    weight = torch.tensor([3.0, 9.0, -math.inf, 1.0, 4.0, 1.0, math.nan])[:, None]
    readout = Readout(padded_rows(weight, shard), shard=shard, group=dist.group.WORLD)
    return readout.top_k(torch.ones(2, 1), 7)[1].tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_id_comes_once_for_every_split(world):
    """A rank has fewer rows than k, and logits are as low as the filling."""
    assert run_ranks(world, top_of_a_broken_matrix) == [[[1, 4, 0, 3, 5, 2, 6]] * 2] * world


def test_no_tokens_give_empty_results():
    read = alone(torch.randn(7, 2)).read(torch.randn(2, 0, 2), k=2)
    assert read.top_ids.shape == (2, 0, 2) and read.lse.shape == (2, 0)


def gathered(rank: int, world: int) -> list[int]:
    """Returns the bytes of hidden states in each chunk, for a matrix with few rows."""
    shard = VocabShard.of(rank, world, 64, 1)
    settings = {"group": dist.group.WORLD, "tokens": "distinct", "memory_mib": 1}
    readout = Readout(torch.randn(shard.rows, 512), shard=shard, **settings)
    hidden, plain, seen = torch.randn(4, 100, 512), readout._chunks, []

    def spied(*arguments):
        for chunk in plain(*arguments):
            seen.append(chunk[0].hidden_mD.nbytes + chunk[2].nbytes)
            yield chunk

    readout._chunks = spied  # type: ignore[method-assign]
    readout.read(hidden, reference_RND=hidden[:1])
    return seen


def test_gathered_hidden_states_count_in_the_budget():
    for seen in run_ranks(2, gathered):
        assert sum(seen) >= 2 * 5 * 100 * 512 * 4 and 2 * max(seen) <= 2**20


def test_memory_stays_within_the_budget():
    """512 tokens by 40,000 rows would be 82 MB per slab of logits; the budget includes what is computed from them."""
    peak = 0

    class Peak(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                peak = max(peak, result.untyped_storage().nbytes())
            return result

    readout = alone(torch.randn(40_000, 8), memory_mib=16)
    hidden, ids = torch.randn(2, 512, 8), torch.zeros(512, 2).long()
    with Peak():
        readout.read(hidden, k=5, ids_NJ=ids, reference_RND=hidden)
    slabs = 10
    assert peak <= 16 * 2**20 // slabs * 2, f"one tensor of {peak / 2**20:.1f} MiB"  # int64 indices are twice as wide


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: Readout(torch.ones(3, 2), shard=VocabShard.of(0, 1, 4, 1)), "weight has 3 rows, but the shard has 4"),
        (lambda: alone(torch.ones(3, 2), memory_mib=0), "memory_mib=0 must be positive"),
        (lambda: alone(torch.ones(3, 2), tokens="mine"), "tokens='mine' must be"),
        (lambda: alone(torch.ones(3, 2)).top_k(torch.ones(1, 2), 4), r"k=4 must be in \[0, 3\]"),
        (lambda: alone(torch.ones(3, 2)).top_k(torch.ones(1, 3), 1), "as wide as the rows: 2"),
        (lambda: alone(torch.ones(3, 2)).masked_mass(torch.ones(1, 2), torch.ones(2).bool()), "mask has .* 3 rows"),
    ],
)
def test_error_names_mismatched_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rows", [0, 1, 2**13, 512_000])
def test_entropy_of_many_rows_matches_float64(rows):
    logits_mv = 5 * torch.randn(3, rows, generator=torch.Generator().manual_seed(rows))
    own = ShardSoftmax.of(logits_mv)
    truth_m = (own.exp_mv.double() * own.shifted_mv.double()).sum(1)
    assert_close(dot(own.exp_mv, own.shifted_mv).double(), truth_m, rtol=1e-6, atol=0)

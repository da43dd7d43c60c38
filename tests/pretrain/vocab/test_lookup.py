"""The sharded lookup against a dense float64 truth."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.vocab import VocabShard
from pretrain.vocab.lookup import DistinctRows, GatheredTokens, LookupPlan, plan_lookup, vocab_parallel_lookup
from tests.pretrain.helpers import padded_rows
from tests.ranks import run_ranks

WIDTH, TOKENS = 5, 9


def problem(world: int, vocab_size: int):
    """ids [world, N] with many duplicates, weight [V, D] and upstream gradients [world, N, D], float64."""
    generator = torch.Generator().manual_seed(world + vocab_size)
    ids = torch.randint(vocab_size, (world, TOKENS), generator=generator)
    ids[:, :3] = ids[0, 0]  # all ranks need this row, several times
    weight = torch.randn(vocab_size, WIDTH, generator=generator, dtype=torch.float64)
    return ids, weight, torch.randn(world, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def rank_lookup(rank, world, vocab_size, multiple, planned):
    ids, weight, upstream = problem(world, vocab_size)
    shard = VocabShard.of(rank, world, vocab_size, multiple)
    rows = padded_rows(weight, shard).requires_grad_()
    plan = plan_lookup(list(ids), shard, rows.dtype) if planned else None
    hidden = vocab_parallel_lookup(ids[rank], rows, shard=shard, group=dist.group.WORLD, plan=plan)
    hidden.backward(upstream[rank])
    return hidden.detach(), rows.grad


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size,multiple", [(37, 4), (5, 8)], ids=["uneven", "empty shards"])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "asked"])
def test_rows_and_gradient_match_dense(world, vocab_size, multiple, planned):
    ids, weight, upstream = problem(world, vocab_size)
    weight.requires_grad_()
    truth = F.embedding(ids, weight)
    truth.backward(upstream)
    results = run_ranks(world, rank_lookup, vocab_size, multiple, planned)
    assert torch.equal(torch.stack([hidden for hidden, _ in results]), truth.detach())
    gradient = torch.cat([gradient for _, gradient in results])
    torch.testing.assert_close(gradient[:vocab_size], weight.grad, rtol=1e-12, atol=1e-12)
    assert (gradient[vocab_size:] == 0).all()


def rank_bf16(rank, world):
    ids, weight, upstream = problem(world, 37)
    shard = VocabShard.of(rank, world, 37, 1)
    rows = padded_rows(weight.float(), shard).requires_grad_()
    hidden = vocab_parallel_lookup(ids[rank], rows, shard=shard, group=dist.group.WORLD, dtype=torch.bfloat16)
    hidden.backward(upstream[rank].bfloat16())
    return hidden.detach(), rows.grad


def test_bf16_lookup_sums_gradients_in_fp32():
    ids, weight, upstream = problem(3, 37)
    main = weight.float().requires_grad_()
    F.embedding(ids, main).backward(upstream.bfloat16().float())
    results = run_ranks(3, rank_bf16)
    assert torch.equal(torch.stack([hidden for hidden, _ in results]), weight.float().bfloat16()[ids])
    gradient = torch.cat([gradient for _, gradient in results])
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, main.grad)  # summed in fp32: no digits lost to bf16


def test_one_process_needs_no_group():
    ids, weight, _ = problem(1, 37)
    assert torch.equal(vocab_parallel_lookup(ids[0], weight, shard=VocabShard.of(0, 1, 37, 1)), weight[ids[0]])


@pytest.mark.parametrize("bad", [-1, 37, 39])
def test_error_names_an_id_outside_the_vocabulary(bad):
    shard = VocabShard.of(0, 1, 37, 8)
    with pytest.raises(ValueError, match=rf"{bad}.*outside \[0, vocab_size=37\)"):
        vocab_parallel_lookup(torch.tensor([3, bad]), torch.zeros(shard.rows, WIDTH), shard=shard)


def rank_with_any_number_of_ids(rank, world):
    """Looks up with a plan, which knows all ranks' ids, so their numbers may differ."""
    ids, weight, _ = problem(world, 37)
    ragged = [ids[other][: 3 * other] for other in range(world)]
    shard = VocabShard.of(rank, world, 37, 4)
    plan = plan_lookup(ragged, shard, torch.float64)
    rows = padded_rows(weight, shard).requires_grad_()
    hidden = vocab_parallel_lookup(ragged[rank], rows, shard=shard, group=dist.group.WORLD, plan=plan)
    hidden.sum().backward()
    assert torch.equal(hidden, weight[ragged[rank]])
    return rows.grad


def test_planned_ranks_may_have_different_numbers_of_ids():
    ids, weight, _ = problem(3, 37)
    weight.requires_grad_()
    F.embedding(torch.cat([ids[1][:3], ids[2][:6]]), weight).sum().backward()
    torch.testing.assert_close(torch.cat(run_ranks(3, rank_with_any_number_of_ids))[:37], weight.grad)


def text_like_ids(world: int, vocab_size: int, tokens: int) -> list[torch.Tensor]:
    """Zipf's law: low ids are frequent."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1.0 / torch.arange(1, vocab_size + 1)
    return [torch.multinomial(frequency, tokens, replacement=True, generator=generator) for _ in range(world)]


def test_distinct_rows_move_less_than_half_the_bytes():
    """Compares with reduce-scatter and all-gather of [N, D] in bf16, on 2 ranks; ids as in text."""
    ids_pN = text_like_ids(2, 8192, 4096)
    for rank in range(2):
        plan = plan_lookup(ids_pN, VocabShard.of(rank, 2, 8192), torch.bfloat16)
        assert isinstance(plan, DistinctRows)
        assert sum(plan.receive_counts) == len(ids_pN[rank].unique())
        sent, received = plan.send_counts[1 - rank], plan.receive_counts[1 - rank]
        ours = 2 * sent + 4 * received  # rows out in bf16, gradients back in fp32
        theirs = 2 * 4096 + 2 * 4096
        assert ours < theirs / 2
        assert plan.traffic.saved > 0.5


def counted(collective, counts):
    """Wraps the collective and adds the bytes that this rank sends to others to `counts`."""

    def count(out, parts, receive, send, group):
        mine = dist.get_rank(group)
        rows = sum(send) - send[mine]
        counts.append(rows * parts.shape[1] * parts.element_size())
        return collective(out, parts, receive, send, group)

    return count


def rank_bytes(rank, world):
    ids_pN = text_like_ids(world, 512, 300)
    shard = VocabShard.of(rank, world, 512, 1)
    plan = plan_lookup(ids_pN, shard, torch.bfloat16)
    counts: list[int] = []
    dist.all_to_all_single = counted(dist.all_to_all_single, counts)
    rows = torch.randn(shard.rows, WIDTH).requires_grad_()
    vocab_parallel_lookup(
        ids_pN[rank], rows, shard=shard, group=dist.group.WORLD, dtype=torch.bfloat16, plan=plan
    ).sum().backward()
    return sum(counts), plan.traffic


@pytest.mark.parametrize("world", [2, 3, 4])
def test_logged_traffic_is_what_crossed(world):
    results = run_ranks(world, rank_bytes)
    traffic = results[0][1]
    assert all(its == traffic for _, its in results)  # all ranks log and use the same numbers
    assert sum(sent for sent, _ in results) == traffic.moved * WIDTH
    assert traffic.gathered == 2 * 2 * (world - 1) * world * 300
    assert 1 <= traffic.balance <= world


def test_balance_is_the_busiest_owner_over_the_mean():
    """All ids are rows of rank 0, so rank 1 sends nothing."""
    ids_pN = [torch.arange(4), torch.arange(4)]
    assert plan_lookup(ids_pN, VocabShard.of(0, 2, 8, 1), torch.float32).traffic.balance == 2
    even = [torch.tensor([0, 4]), torch.tensor([0, 4])]
    assert plan_lookup(even, VocabShard.of(0, 2, 8, 1), torch.float32).traffic.balance == 1


def lopsided(world: int, vocab_size: int):
    """Returns ids that occur once, all of them rows of the first rank: the worst case of an all-to-all."""
    first = VocabShard.of(0, world, vocab_size, 1).rows
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(first, generator=generator)[:TOKENS] for _ in range(world)])
    weight = torch.randn(vocab_size, WIDTH, generator=generator).bfloat16().float()
    return ids, weight, torch.randn(world, TOKENS, WIDTH, generator=generator).bfloat16()


def rank_gathers(rank, world, vocab_size):
    ids, weight, upstream = lopsided(world, vocab_size)
    shard = VocabShard.of(rank, world, vocab_size, 1)
    plan = plan_lookup(list(ids), shard, torch.bfloat16)
    assert isinstance(plan, GatheredTokens) and plan.traffic.saved == 0
    rows = weight[shard.start : shard.stop].clone().requires_grad_()
    hidden = vocab_parallel_lookup(
        ids[rank], rows, shard=shard, group=dist.group.WORLD, dtype=torch.bfloat16, plan=plan
    )
    hidden.backward(upstream[rank])
    return hidden.detach(), rows.grad


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gathers_if_that_moves_less(world):
    """Few ids that hardly repeat, with one owner: fp32 gradients of its rows would be more than bf16 of all."""
    ids, weight, upstream = lopsided(world, 80)
    results = run_ranks(world, rank_gathers, 80)
    assert torch.equal(torch.stack([hidden for hidden, _ in results]), weight[ids].bfloat16())
    weight.requires_grad_()
    F.embedding(ids, weight).backward(upstream.float())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]), weight.grad)


def test_does_not_gather_in_fp32_or_if_ids_repeat():
    ids, _, _ = lopsided(2, 80)
    shard = VocabShard.of(0, 2, 80, 1)
    assert isinstance(plan_lookup(list(ids), shard, torch.float32), DistinctRows)
    assert isinstance(plan_lookup([ids[0] // 8, ids[1] // 8], shard, torch.bfloat16), DistinctRows)


def test_main_gradient_is_added_to_in_place():
    ids, weight, upstream = problem(1, 37)
    rows, main_grad = weight.clone().requires_grad_(), torch.ones_like(weight)
    shard = VocabShard.of(0, 1, 37, 1)
    vocab_parallel_lookup(ids[0], rows, shard=shard, main_grad=lambda: [main_grad]).backward(upstream[0])
    weight.requires_grad_()
    F.embedding(ids, weight).backward(upstream)
    assert rows.grad is None
    torch.testing.assert_close(main_grad, weight.grad + 1)


class Operations(TorchDispatchMode):
    """Records the names of the operations that run, and checks that none adds to a row twice."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        if function.overloadpacket.__name__ in ("index_add", "index_add_"):
            assert len(args[2].unique()) == len(args[2]), "on a GPU the order of this sum is not fixed"
        return function(*args, **(kwargs or {}))


RACY = {"embedding_dense_backward", "scatter_add", "scatter_add_", "index_put", "index_put_", "bincount"}


def planned_gradient(ids_N: torch.Tensor, upstream_ND: torch.Tensor, kind: type[LookupPlan]) -> torch.Tensor:
    """Returns the gradient of 50 rows in one process, by a plan of that kind; checks the operations that it runs."""
    plan = plan_lookup([ids_N], VocabShard.of(0, 1, 50, 1), upstream_ND.dtype)
    if kind is GatheredTokens:
        rows_U, places_N = ids_N.unique(return_inverse=True)
        plan = GatheredTokens(
            plan.traffic, len(ids_N), torch.arange(len(ids_N)), rows_U, type(plan.mine).of(places_N, 50)
        )
    assert isinstance(plan, kind)
    gradient_vD = torch.zeros(50, upstream_ND.shape[1])
    with Operations() as ran:
        plan.add_gradient(upstream_ND, [gradient_vD], None)
    assert not ran.names & RACY
    return gradient_vD


@pytest.mark.parametrize("kind", [DistinctRows, GatheredTokens])
@pytest.mark.parametrize("tokens", [64, 1025, 3072, 5000])
def test_gradients_of_a_row_add_up_in_the_order_of_its_tokens(kind, tokens):
    """The sum is exact to the last bit in fp32, and uses no operation with another order or a race on a GPU."""
    generator = torch.Generator().manual_seed(tokens)
    ids_N = torch.cat([torch.arange(50), torch.randint(50, (tokens - 50,), generator=generator)])
    upstream_ND = torch.randn(tokens, WIDTH, generator=generator).bfloat16()
    expected_vD = torch.zeros(50, WIDTH)
    for row, gradient_D in zip(ids_N.tolist(), upstream_ND.float(), strict=True):
        expected_vD[row] += gradient_D
    assert torch.equal(planned_gradient(ids_N, upstream_ND, kind), expected_vD)

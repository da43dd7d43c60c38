"""The sharded lookup against a dense float64 truth."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.vocab import LookupPlan, VocabShard, vocab_parallel_lookup
from tests.pretrain.helpers import padded_rows
from tests.ranks import run_ranks

WIDTH, TOKENS = 5, 9


def problem(world: int, vocab_size: int):
    """ids [world, N] with many duplicates, weight [V, D] and upstream gradients [world, N, D], float64."""
    generator = torch.Generator().manual_seed(world + vocab_size)
    ids = torch.randint(vocab_size, (world, TOKENS), generator=generator)
    ids[:, :3] = ids[0, 0]  # one row asked for by everybody, again and again
    weight = torch.randn(vocab_size, WIDTH, generator=generator, dtype=torch.float64)
    return ids, weight, torch.randn(world, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def rank_lookup(rank, world, vocab_size, multiple, planned):
    ids, weight, upstream = problem(world, vocab_size)
    shard = VocabShard.of(rank, world, vocab_size, multiple)
    rows = padded_rows(weight, shard).requires_grad_()
    plan = LookupPlan.of(list(ids), shard) if planned else None
    hidden = vocab_parallel_lookup(ids[rank], rows, shard=shard, group=dist.group.WORLD, plan=plan)
    hidden.backward(upstream[rank])
    return hidden.detach(), rows.grad


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size,multiple", [(37, 4), (5, 8)], ids=["uneven", "empty shards"])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "asked"])
def test_rows_and_their_gradient(world, vocab_size, multiple, planned):
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


def test_bf16_out_of_fp32_main_weights():
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
def test_an_id_that_is_no_row_is_named(bad):
    shard = VocabShard.of(0, 1, 37, 8)
    with pytest.raises(ValueError, match=rf"{bad}.*outside \[0, vocab_size=37\)"):
        vocab_parallel_lookup(torch.tensor([3, bad]), torch.zeros(shard.rows, WIDTH), shard=shard)


def rank_with_any_number_of_ids(rank, world):
    """A plan knows all ranks' ids, so they need not bring as many."""
    ids, weight, _ = problem(world, 37)
    ragged = [ids[other][: 3 * other] for other in range(world)]
    shard = VocabShard.of(rank, world, 37, 4)
    plan = LookupPlan.of(ragged, shard)
    rows = padded_rows(weight, shard).requires_grad_()
    hidden = vocab_parallel_lookup(ragged[rank], rows, shard=shard, group=dist.group.WORLD, plan=plan)
    hidden.sum().backward()
    assert torch.equal(hidden, weight[ragged[rank]])
    return rows.grad


def test_with_a_plan_ranks_may_bring_different_numbers_of_ids():
    ids, weight, _ = problem(3, 37)
    weight.requires_grad_()
    F.embedding(torch.cat([ids[1][:3], ids[2][:6]]), weight).sum().backward()
    torch.testing.assert_close(torch.cat(run_ranks(3, rank_with_any_number_of_ids))[:37], weight.grad)


def test_only_distinct_rows_cross_and_fewer_than_half_the_bytes():
    """Against reduce-scatter forward and all-gather backward, both of [N, D] in bf16, on 2 ranks; ids as in text."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1.0 / torch.arange(1, 8193)  # Zipf's law
    ids_pN = [torch.multinomial(frequency, 4096, replacement=True, generator=generator) for _ in range(2)]
    for rank in range(2):
        plan = LookupPlan.of(ids_pN, VocabShard.of(rank, 2, 8192))
        assert sum(plan.receive_counts) == len(ids_pN[rank].unique())
        sent, received = plan.send_counts[1 - rank], plan.receive_counts[1 - rank]
        ours = 2 * sent + 4 * received  # rows out in bf16, gradients back in fp32
        theirs = 2 * 4096 + 2 * 4096
        assert ours < theirs / 2

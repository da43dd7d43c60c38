"""The sharded lookup against a dense float64 truth."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pretrain.vocab import VocabShard, vocab_parallel_lookup
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


def rank_lookup(rank, world, vocab_size, multiple):
    ids, weight, upstream = problem(world, vocab_size)
    shard = VocabShard.of(rank, world, vocab_size, multiple)
    rows = padded_rows(weight, shard).requires_grad_()
    hidden = vocab_parallel_lookup(ids[rank], rows, shard=shard, group=dist.group.WORLD)
    hidden.backward(upstream[rank])
    return hidden.detach(), rows.grad


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size,multiple", [(37, 4), (5, 8)], ids=["uneven", "empty shards"])
def test_rows_and_their_gradient(world, vocab_size, multiple):
    ids, weight, upstream = problem(world, vocab_size)
    weight.requires_grad_()
    truth = F.embedding(ids, weight)
    truth.backward(upstream)
    results = run_ranks(world, rank_lookup, vocab_size, multiple)
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
    with pytest.raises(ValueError, match=rf"{bad}.*outside \[0, 37\)"):
        vocab_parallel_lookup(torch.tensor([3, bad]), torch.zeros(shard.rows, WIDTH), shard=shard)

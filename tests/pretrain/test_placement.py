"""vocab.parallel=auto: estimates match real traffic, and the choices are right."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pretrain.placement import Machine, Workload, choose_parallel, estimate, transfers, weights_gathered
from pretrain.vocab import VocabShard, collectives
from pretrain.vocab import vocab_parallel_linear_cross_entropy as cross_entropy
from tests.ranks import run_ranks

LLAMA3 = Workload(rows=128_256, width=4096, matrices=1, tokens=8192, micro_batches=4, itemsize=2, state=8)
GPT2 = Workload(rows=50_304, width=768, matrices=1, tokens=8192, micro_batches=4, itemsize=2, state=8)
NODE = Machine.of("cuda", world=8, node=8)
NODES = Machine.of("cuda", world=64, node=8)


def rank_bytes_of_the_loss(rank, world, rows, width, tokens):
    """Bytes that one rank sends to others in the loss."""
    sent = []

    def count(collective, others):
        def counted(out, mine, group, async_op):
            sent.append(others(mine) * mine.element_size())
            return collective(out, mine, group=group, async_op=async_op)

        return counted

    collectives._all_gather = count(collectives._all_gather, lambda mine: mine.numel() * (world - 1))
    collectives._reduce_scatter = count(collectives._reduce_scatter, lambda parts: parts.numel() * (world - 1) // world)
    shard = VocabShard.of(rank, world, rows, 1)
    weight = torch.randn(shard.rows, width, requires_grad=True)
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    targets = torch.randint(rows, (tokens,))
    options = {"scale": 1.0, "main_grad_vD": torch.zeros_like(weight), "metrics": False, "max_tokens_per_rank": tokens}
    cross_entropy(hidden, weight, targets, shard=shard, group=dist.group.WORLD, **options).loss.backward()
    return sum(sent)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_loss_traffic_matches_estimate(world):
    rows, width, tokens = 96, 2048, 64
    work = Workload(rows, width, matrices=1, tokens=tokens, micro_batches=1, itemsize=2, state=8)
    estimate = sum(one.sent for one in transfers(world, work, world) if one.kind != "all-to-all")
    for sent in run_ranks(world, rank_bytes_of_the_loss, rows, width, tokens):
        assert sent == estimate


def test_tokens_are_cheaper_than_weights_below_row_count():
    for tokens, cheaper in ((LLAMA3.rows // 64, True), (LLAMA3.rows // 4, False)):
        work = replace(LLAMA3, tokens=tokens)
        assert (estimate(8, work, NODE).sent < weights_gathered(work, NODE).sent) == cheaper


@pytest.mark.parametrize("work", [LLAMA3, GPT2, replace(LLAMA3, matrices=2)], ids=["llama3", "gpt2", "untied"])
def test_auto_chooses_one_copy_per_node(work):
    """Inside a node, matmuls hide the traffic of tokens; between nodes they would not."""
    assert choose_parallel("auto", work, NODE).ranks == 8
    assert choose_parallel("auto", work, NODES).ranks == 8


def test_auto_chooses_one_copy_per_rank_for_small_vocabulary():
    work = Workload(rows=1000, width=1024, matrices=1, tokens=65_536, micro_batches=1, itemsize=2, state=8)
    assert choose_parallel("auto", work, Machine.of("cpu", 8, 8)).ranks == 1


def test_memory_breaks_ties_between_equal_times():
    """Four and eight ranks per node are equally fast, because matmuls dominate; eight need half the memory."""
    times = [estimate(p, LLAMA3, NODE).seconds for p in (4, 8)]
    assert abs(times[0] / times[1] - 1) < 0.05
    assert choose_parallel("auto", LLAMA3, NODE).ranks == 8


def test_auto_explains_choice():
    why = choose_parallel("auto", LLAMA3, NODES).why
    assert why.startswith("vocab.parallel=auto: 8 of 64 ranks share a copy\n")
    lines = why.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["1", "2", "4", "8", "16", "32", "64"]
    assert [line for line in lines if line.endswith("<")] == [lines[5]]
    assert lines[-1].split()[:2] == ["(FSDP2)", "769"]


@pytest.mark.parametrize("asked,better", [("1", 8), ("64", 8), ("8", None), ("4", None)])
def test_much_slower_setting_warns(asked, better):
    parallel = choose_parallel(asked, GPT2, NODES)
    assert parallel.ranks == int(asked)
    if better:
        assert parallel.why.startswith(f"vocab.parallel={asked} is clearly worse than 8, which auto would choose\n")
    else:
        assert parallel.why == ""


def test_size_must_divide_ranks():
    with pytest.raises(ValueError, match=r"vocab\.parallel=4 must divide the number of ranks, 6"):
        choose_parallel("4", GPT2, Machine.of("cpu", 6, 6))


def test_single_rank_prints_nothing():
    parallel = choose_parallel("auto", GPT2, Machine.of("cpu", 1, 1))
    assert parallel.ranks == 1 and parallel.why == ""

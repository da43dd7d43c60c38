"""Ownership of rows; initial rows are the same for every split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from pretrain.vocab import VocabShard
from pretrain.vocab.shard import seeded_normal, stable_seed

SPLITS = {
    "vocab_size": st.integers(1, 2000),
    "multiple": st.sampled_from([1, 2, 7, 64, 128]),
    "world": st.integers(1, 17),
}


def all_shards(world: int, vocab_size: int, multiple: int) -> list[VocabShard]:
    return [VocabShard.of(rank, world, vocab_size, multiple) for rank in range(world)]


@settings(deadline=None)
@given(**SPLITS)
def test_every_row_has_one_owner(vocab_size, multiple, world):
    shards = all_shards(world, vocab_size, multiple)
    padded = shards[0].padded_size
    assert vocab_size <= padded < vocab_size + multiple and padded % multiple == 0
    assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(range(padded))
    assert sum(shard.valid_rows for shard in shards) == vocab_size
    ids = torch.arange(-3, padded + 3)
    owners = torch.stack([shard.holds(ids) for shard in shards]).sum(0)
    assert torch.equal(owners, ((ids >= 0) & (ids < vocab_size)).long())  # padding and negative ids have no owner


@settings(deadline=None)
@given(**SPLITS)
def test_shards_match_torch_chunk(vocab_size, multiple, world):
    shards = all_shards(world, vocab_size, multiple)
    padded = shards[0].padded_size
    chunks = torch.arange(padded).chunk(world)  # leaves out empty chunks
    assert [shard.rows for shard in shards if shard.rows] == [len(chunk) for chunk in chunks]
    for shard in shards:
        assert (shard.rows, shard.start) == Shard.local_shard_size_and_offset(padded, world, shard.rank)


@settings(deadline=None)
@given(**SPLITS)
def test_local_ids_count_from_the_first_row(vocab_size, multiple, world):
    for shard in all_shards(world, vocab_size, multiple):
        ids = torch.arange(vocab_size)
        assert torch.equal(shard.local(ids[shard.holds(ids)]), torch.arange(shard.valid_rows))


@pytest.mark.parametrize("vocab_size,multiple", [(1000, 128), (300, 1), (5, 128), (5, 1), (257, 2)])
def test_initial_rows_are_the_same_for_any_split(vocab_size, multiple):
    def matrix(world: int) -> torch.Tensor:
        return torch.cat(
            [s.initial_rows("embedding.weight", 7, 3, 0.02) for s in all_shards(world, vocab_size, multiple)]
        )

    whole = matrix(1)
    assert whole.dtype == torch.float32 and whole.shape == (VocabShard.of(0, 1, vocab_size, multiple).padded_size, 3)
    assert (whole[vocab_size:] == 0).all() and (whole[:vocab_size] != 0).all()
    for world in (2, 3, 4, 7, 8):
        assert torch.equal(matrix(world), whole)


def test_initial_rows_are_normal_and_differ_by_seed_name_and_block():
    rows = seeded_normal("a", 0, 0, 4096, 64, 0.02)
    assert abs(rows.std() - 0.02) < 1e-4 and abs(rows.mean()) < 2e-4
    blocks = [
        rows[:128],
        rows[128:256],
        seeded_normal("a", 1, 0, 128, 64, 0.02),
        seeded_normal("b", 0, 0, 128, 64, 0.02),
    ]
    assert len({block.numpy().tobytes() for block in blocks}) == 4
    assert torch.equal(rows[100:300], seeded_normal("a", 0, 100, 300, 64, 0.02))


def test_seeds_are_part_of_the_format():
    assert stable_seed(0, "embedding.weight", 0) == 2213533309183970491  # a change would change every new run


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((-1, 2, 10), r"rank=-1 must be in \[0, world=2\)"),
        ((2, 2, 10), r"rank=2 must be in \[0, world=2\)"),
        ((0, 0, 10), r"rank=0 must be in \[0, world=0\)"),
        ((0, 1, 0), "vocab_size=0 must be at least 1"),
        ((0, 1, 10, 0), "multiple=0 must be at least 1"),
    ],
)
def test_error_names_what_is_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        VocabShard.of(*arguments)


def test_threads_do_not_change_initial_rows():
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            drawn.append(seeded_normal("weight", 0, 100, 1000, 8, 0.02))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn) and drawn[0].std() > 0.01

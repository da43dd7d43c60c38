"""Batches are a pure function of the samples consumed, for any number of ranks and any sizes."""

import threading

import numpy as np
import pytest
import torch

from data_prep.token_file import TokenFile
from pretrain.config.lengths import Batches
from pretrain.data import IGNORED, Order, Samples, Windows
from pretrain.data import loader as loading
from pretrain.data.blend import Blend
from pretrain.data.loader import BatchLoader, validation_batches
from pretrain.vocab import VocabShard
from pretrain.vocab.lookup import plan_lookup
from tests.pretrain.helpers import write_tokens

SEQ_LEN, WINDOWS = 8, 40
ONE_SHARD = VocabShard.of(0, 1, 1000)


@pytest.fixture
def windows(tmp_path):
    """Makes 40 windows. Every token is its position, so its first token identifies a window."""
    write_tokens(tmp_path / "a", np.arange(SEQ_LEN * WINDOWS), 1000)  # the last window lacks one target
    return Windows((TokenFile(tmp_path / "a"),), SEQ_LEN)


@pytest.fixture
def loader(windows):
    """Builds loaders and closes all of them."""
    built = []

    def build(rank=0, world=1, global_batch=8, micro_batch=1, shard=ONE_SHARD, data=windows, schedule=None, **state):
        batches = Batches.of(global_batch, schedule or {}, SEQ_LEN)
        settings = {"batches": batches, "micro_batch": micro_batch, "rank": rank, "world": world}
        samples = Samples({"a": (data, Order(len(windows), seed=0, corpus="a"))}, Blend({0: [1]}))
        device = torch.device("cpu")
        built.append(BatchLoader(samples, shard=shard, dtype=torch.float32, device=device, prefetch=2, **settings))
        built[-1].load_state_dict(state)
        return built[-1]

    yield build
    for each in built:
        each.close()


def samples(batch) -> list[int]:
    """Windows of a rank's batch, in order."""
    return [int(tokens[0]) // SEQ_LEN for micro in batch.micro_batches for tokens in micro.tokens_BT]


@pytest.mark.parametrize("masked", [False, True])
def test_read_keeps_the_order_of_several_corpora(tmp_path, masked):
    corpora = []
    for first in (0, 200, 400):
        write_tokens(tmp_path / f"{first}", np.arange(first, first + 100), 1000)
        corpora.append(Windows((TokenFile(tmp_path / f"{first}"),), SEQ_LEN, masked=masked))
    wanted = [(2, 3), (0, 1), (2, 0), (1, 5), (0, 0), (0, 1)]
    micro = loading.read([(corpora[c], index) for c, index in wanted], 1000)
    assert micro.tokens_BT[:, 0].tolist() == [200 * c + SEQ_LEN * index for c, index in wanted]
    assert torch.equal(micro.targets_BT, micro.tokens_BT + 1)
    assert (micro.starts_BT is not None) == masked


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ranks_share_global_batch(loader, world, micro_batch):
    alone = loader()
    ranks = [loader(rank, world, micro_batch=micro_batch) for rank in range(world)]
    for _ in range(6):  # into the second epoch
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert sorted(place for part in parts for place in samples(part)) == sorted(samples(whole))
        assert sum(part.n_targets for part in parts) == whole.n_targets
        for micro in (micro for part in parts for micro in part.micro_batches):
            assert micro.tokens_BT.shape == (micro_batch, SEQ_LEN)
            valid = micro.targets_BT != IGNORED
            assert torch.equal(micro.targets_BT[valid], micro.tokens_BT[valid] + 1)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_order_does_not_depend_on_ranks_or_micro_batch(loader, windows, world, micro_batch):
    """Concatenates the ranks' micro-batches, which must give the order."""
    ranks = [loader(rank, world, 96, micro_batch) for rank in range(world)]
    order = Order(len(windows), seed=0, corpus="a")
    for step in range(3):  # each longer than two epochs
        batches = [next(rank).micro_batches for rank in ranks]
        dealt = [micro for together in zip(*batches, strict=True) for micro in together]
        served = [int(tokens[0]) // SEQ_LEN for micro in dealt for tokens in micro.tokens_BT]
        assert served == order(step * 96, 96).tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_matches_several_ranks_together(loader, world):
    (whole,) = next(loader(micro_batch=8)).micro_batches
    parts = [next(loader(rank, world, micro_batch=8 // world)).micro_batches for rank in range(world)]
    assert torch.equal(torch.cat([micro.tokens_BT for (micro,) in parts]), whole.tokens_BT)


def test_no_sample_repeats_or_is_lost_after_change(loader):
    seen, state = [], {}
    for world, global_batch, micro_batch, steps in [(2, 8, 2, 2), (1, 3, 3, 3), (4, 4, 1, 2), (1, 7, 1, 1)]:
        ranks = [loader(rank, world, global_batch, micro_batch, **state) for rank in range(world)]
        seen += [place for _ in range(steps) for rank in ranks for place in samples(next(rank))]
        states = [rank.state_dict() for rank in ranks]
        assert states == [{"a": len(seen)}] * world  # prefetched batches do not count
        state = states[0]
    assert sorted(seen) == list(range(WINDOWS))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_growing_batches_keep_the_order(loader, windows, world):
    """Stops inside each size: the next loader takes the same samples, for any number of ranks."""
    schedule, order, taken = {"24 samples": 12, "30 samples": 18}, Order(len(windows), seed=0, corpus="a"), 0
    sizes = [6, 6, 6, 6, 12, 18, 18]
    for stop in (3, 5, 6, 7):
        ranks = [loader(rank, world, 6, 2 if world == 3 else 1, schedule=schedule, a=taken) for rank in range(world)]
        begun = next(step for step in range(8) if sum(sizes[:step]) == taken)
        for size in sizes[begun:stop]:
            batches = [next(rank).micro_batches for rank in ranks]
            dealt = [micro for together in zip(*batches, strict=True) for micro in together]
            served = [int(tokens[0]) // SEQ_LEN for micro in dealt for tokens in micro.tokens_BT]
            assert served == order(taken, size).tolist()
            taken += size
        assert all(rank.state_dict() == {"a": taken} for rank in ranks)


def test_last_window_counts_its_targets(loader):
    assert next(loader(global_batch=WINDOWS)).n_targets == SEQ_LEN * WINDOWS - 1


def test_new_corpus_starts_at_sample_0(loader):
    assert samples(next(loader(other=16))) == samples(next(loader()))


def test_close_stops_thread(loader):
    before = set(threading.enumerate())
    closed = loader()
    next(closed)
    assert len(set(threading.enumerate()) - before) == 1
    closed.close()
    closed.close()  # a second close does nothing
    assert set(threading.enumerate()) == before


class Remote(Windows):
    """Takes note of what is asked for in advance."""

    def prefetch(self, indices):
        self.asked += indices


def test_nothing_is_fetched_behind_the_last_step(loader, windows):
    remote = Remote(windows.files, SEQ_LEN)
    remote.remote, remote.asked = True, []
    near_its_end = loader(data=remote)
    near_its_end.end = 24
    for _ in range(4):  # the guard may have left out some before
        next(near_its_end)
    near_its_end.close()
    assert remote.asked == Order(WINDOWS, seed=0, corpus="a")(0, 24).tolist()


class Stuck(Windows):
    """Waits after its first batch, as for a store that does not answer."""

    def batch(self, indices):
        self.asked += 1
        assert self.asked == 1 or self.answers.wait(30)
        return super().batch(indices)


def test_close_does_not_wait_for_a_store(loader, windows, monkeypatch):
    monkeypatch.setattr(loading, "CLOSE_SECONDS", 0.1)
    stuck = Stuck(windows.files, SEQ_LEN)
    stuck.asked, stuck.answers = 0, threading.Event()
    closed = loader(global_batch=1, data=stuck)
    next(closed)
    closing = threading.Thread(target=closed.close)
    closing.start()
    closing.join(10)
    try:
        assert not closing.is_alive()
        closed.restart({}, Samples({"a": (windows, Order(WINDOWS, seed=0, corpus="a"))}, Blend({0: [1]})))
        again = samples(next(closed))
    finally:
        stuck.answers.set()
    assert again == samples(next(loader(global_batch=1)))


class Broken(Windows):
    def batch(self, indices):
        raise OSError("the disk is gone")


def test_thread_error_reaches_consumer(loader):
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader(data=Broken((), SEQ_LEN)))


def test_id_beyond_vocabulary_raises(loader):
    largest = SEQ_LEN * WINDOWS - 1
    batch = loader(global_batch=WINDOWS, shard=VocabShard.of(0, 1, largest))
    with pytest.raises(ValueError, match=rf"contains id {largest}: vocab\.size={largest} must be larger"):
        next(batch)


def test_negative_id_raises(tmp_path):
    write_tokens(tmp_path / "a", np.arange(9), 70_000)  # int32
    with open(tmp_path / "a.bin", "r+b") as file:
        file.write(np.array([5, -3], "<i4").tobytes())
    windows = Windows((TokenFile(tmp_path / "a"),), 4)
    with pytest.raises(ValueError, match="contains id -3: ids must not be negative"):
        loading.read([(windows, 0)], 70_000)


@pytest.mark.parametrize("most", [0, 13])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_serves_each_window_once(windows, world, most):
    def batches(rank):
        place = {"rank": rank, "world": world, "shard": VocabShard.of(rank, world, 1000)}
        kinds = {"dtype": torch.float32, "device": torch.device("cpu")}
        return list(validation_batches(windows, most, batch=3, **place, **kinds))

    ranks = [batches(rank) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # otherwise the ranks' collectives would not match
    for rank, of_rank in enumerate(ranks):
        for number, micro in enumerate(of_rank):
            ids_pN = [other[number].tokens_BT.flatten() for other in ranks]
            truth = plan_lookup(ids_pN, VocabShard.of(rank, world, 1000), torch.float32)
            assert type(micro.plan) is type(truth) and micro.plan.traffic == truth.traffic
    dealt = [
        int(tokens[0]) // SEQ_LEN
        for rank in ranks
        for micro in rank
        for tokens, targets in zip(micro.tokens_BT, micro.targets_BT, strict=True)
        if (targets != IGNORED).any()
    ]
    assert sorted(dealt) == list(range(most or WINDOWS))


def test_plan_matches_tokens_of_vocab_group(loader):
    """Compares with the plan computed from the ranks' tokens, for four ranks in two groups."""
    shards = [VocabShard.of(rank % 2, 2, 1000) for rank in range(4)]
    batches = [next(loader(rank=rank, world=4, micro_batch=2, shard=shards[rank])) for rank in range(4)]
    for rank, batch in enumerate(batches):
        group = (0, 1) if rank < 2 else (2, 3)
        (micro,) = batch.micro_batches
        ids_pN = [batches[other].micro_batches[0].tokens_BT.flatten() for other in group]
        truth = plan_lookup(ids_pN, shards[rank], torch.float32)
        assert torch.equal(micro.plan.send_rows, truth.send_rows)
        assert torch.equal(micro.plan.mine.order_N, truth.mine.order_N)
        assert (micro.plan.send_counts, micro.plan.receive_counts) == (truth.send_counts, truth.receive_counts)

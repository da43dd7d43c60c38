"""Stops during an evaluation, hangs, and signals at unusual moments."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pretrain.hooks.evaluation
import pretrain.train
from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.config.job import JobConfig
from pretrain.config.training import TrainingConfig
from pretrain.data.loader import MicroBatch, validation_batches
from pretrain.locks import RANKS_LOCK, lock_run
from pretrain.mesh import device_error, lost_peer
from pretrain.stops import STOP_SIGNALS, StopReason, StopRequests
from tests.pretrain.helpers import TIMES, make_corpus
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank
from tests.ranks import run_ranks


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def stopped_while_evaluating(rank: int, world: int, config: JobConfig, number: int) -> tuple[StopReason, list[int]]:
    """Requests a stop on one rank at batch 3 of the second evaluation. Returns batches taken per evaluation."""
    taken: list[int] = []

    def batches(*args: object, **kwargs: object) -> Iterator[MicroBatch]:
        taken.append(0)
        for batch in validation_batches(*args, **kwargs):
            taken[-1] += 1
            if rank == 1 and len(taken) == 2 and taken[-1] == 3:
                os.kill(os.getpid(), number)
            yield batch

    pretrain.hooks.evaluation.validation_batches = batches  # this process is a rank and ends afterwards
    with StopRequests() as requests:
        return pretrain.train.train(config, torch.device("cpu"), requests), taken


@pytest.mark.parametrize("number,step", [(signal.SIGTERM, 8), (signal.SIGUSR1, 12)], ids=["in between", "at the end"])
def test_interrupted_evaluation_is_repeated_after_resume(tmp_path, number, step):
    """Holds also if nothing else is logged at this step, and if the evaluation was the last work of the run."""
    settings = {"train__steps": 12, "eval__every": step // 2, "log__every": 5, "checkpoint__every": 4}
    data = make_corpus(tmp_path / "data")
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "straight", **settings))
    config = tiny_config(data, tmp_path / "parts", **settings)
    (reason, taken), _ = run_ranks(2, stopped_while_evaluating, config, number)
    assert reason is StopReason.REQUESTED and taken[0] > taken[1] == 3, "the evaluation must stop early"
    last = checkpoints(config.run_dir)[-1]
    assert last.name == f"step-{step:08d}" and read_manifest(last)["val_loss"] is None
    assert "val_loss" not in lines(config.run_dir)[-1] and lines(config.run_dir)[-1]["step"] == step
    run_ranks(2, train_rank, config)
    begun = [step + 1] if step < 12 else []  # each start logs its first step
    assert [line for line in lines(config.run_dir) if line["step"] not in begun] == lines(tmp_path / "straight")
    ours, theirs = saved_tensors(config.run_dir), saved_tensors(tmp_path / "straight")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for mine, other in zip(checkpoints(config.run_dir), checkpoints(tmp_path / "straight"), strict=True):
        assert mine.name == other.name and read_manifest(mine)["val_loss"] == read_manifest(other)["val_loss"]
    before = lines(config.run_dir)
    run_ranks(2, train_rank, config)
    assert lines(config.run_dir) == before


@pytest.mark.parametrize(
    "error,device,peer",
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True, False),
        (torch.distributed.DistBackendError("NCCL error ...: unhandled cuda error"), True, True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"), False, True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), False, True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False, False),
        (RuntimeError("shapes cannot be multiplied"), False, False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_are_classified(error, device, peer):
    """An error of both kinds counts as the device's."""
    assert (device_error(error), lost_peer(error)) == (device, peer)


def test_negative_hang_timeout_raises():
    with pytest.raises(ValueError, match=r"train\.hang_timeout=-1 must not be negative \(0: never\)"):
        TrainingConfig(hang_timeout=-1)


def test_signal_during_exit_does_not_kill_rank():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with StopRequests(after=signal.SIG_IGN) as requests:
            pass
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        assert not requests.asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_sighup_requests_stop_unless_ignored():
    """Ignores SIGHUP at the start, as nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.asked()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequests() as requests:
            assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.asked()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_early_signal_ends_only_long_rendezvous(monkeypatch):
    ended = threading.Event()
    with StopRequests() as requests:
        with requests.ending(ended.set):
            pass
        assert not ended.is_set()
        with requests.ending(ended.set):
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended.wait(10)
        ended.clear()
        with requests.ending(ended.set):
            pass  # the other ranks have joined
        assert not ended.is_set()
        monkeypatch.setattr("pretrain.stops.MEETING_SECONDS", 0.1)
        with requests.ending(ended.set):
            assert ended.wait(10)


def test_rank_waits_for_lock_of_lost_node(tmp_path, monkeypatch):
    """Waits for a limited time, then raises an error that a restart may solve."""
    config = tiny_config(tmp_path, tmp_path / "run")
    first = SimpleNamespace(rank=0)
    with lock_run(config.run_dir, RANKS_LOCK):
        monkeypatch.setattr("pretrain.train.LOCK_SECONDS", 0)
        with pytest.raises(OSError, match="is in use by another process"), pretrain.train._held(config, first):
            pass
        with pretrain.train._held(config, SimpleNamespace(rank=1)):
            pass
    monkeypatch.undo()
    other = ExitStack()
    other.enter_context(lock_run(config.run_dir, RANKS_LOCK))
    threading.Timer(0.5, other.close).start()
    with (
        pretrain.train._held(config, first),
        pytest.raises(ValueError, match="in use"),
        lock_run(config.run_dir, RANKS_LOCK),
    ):
        pass

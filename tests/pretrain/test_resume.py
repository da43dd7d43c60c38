"""A resumed run equals an uninterrupted one."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.compose import build_config
from pretrain.config.job import JobConfig
from pretrain.config.monitor import MonitorConfig
from pretrain.config.training import TrainingConfig
from pretrain.stops import Deadline
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step once, in order"
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("tie,precision", [("tied", "fp32"), ("untied", "auto")])
def test_resume_is_bit_exact(tmp_path, tie, precision):
    data = write_tokens(tmp_path / "tokens")
    settings = {"train__steps": 20, "vocab__tie": tie, "train__precision": precision}
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "straight", **settings))
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "parts", train__stop_after=10, **settings))
    assert len(losses(tmp_path / "parts")) == 10
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "parts", **settings))
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    straight, parts = saved_tensors(tmp_path / "straight"), saved_tensors(tmp_path / "parts")
    assert straight.keys() == parts.keys() and any(name.startswith("optim.exp_avg_sq.") for name in parts)
    for name, tensor in straight.items():
        assert torch.equal(tensor, parts[name]), f"{name} differs after resuming"


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> Path:
    """A folder with tokens, a run of 20 steps, and the first 12 steps of the same run."""
    folder = tmp_path_factory.mktemp("runs")
    write_tokens(folder / "tokens")
    run_ranks(2, train_rank, tiny_config(folder / "tokens", folder / "straight"))
    run_ranks(2, train_rank, tiny_config(folder / "tokens", folder / "parts", train__stop_after=12))
    return folder


@pytest.mark.parametrize("world,vocab_parallel", [(1, 1), (4, 4), (4, 2)])
def test_run_continues_at_other_world_size(on_two_ranks, tmp_path, world, vocab_parallel):
    parts = Path(shutil.copytree(on_two_ranks / "parts", tmp_path / "parts"))
    run_ranks(world, train_rank, tiny_config(on_two_ranks / "tokens", parts, vocab__parallel=vocab_parallel))
    assert len(losses(parts)) == 20
    np.testing.assert_allclose(losses(parts), losses(on_two_ranks / "straight"), rtol=1e-5)


def test_position_is_counted_in_samples(tmp_path):
    """Trains on two ranks, then on three with another global batch: no sample is repeated or lost."""
    data = write_tokens(tmp_path / "tokens")
    settings = {"train__steps": 30, "eval__every": 0}
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "run", train__stop_after=10, **settings))
    changed = {"train__global_batch": 18, "train__micro_batch": 6, "train__stop_after": 15}
    run_ranks(3, train_rank, tiny_config(data, tmp_path / "run", **settings | changed))
    run_ranks(1, train_rank, tiny_config(data, tmp_path / "run", train__stop_after=16, **settings))
    samples = [read_manifest(folder)["samples"] for folder in checkpoints(tmp_path / "run")]
    assert [sum(of_corpus.values()) for of_corpus in samples] == [10 * 12, 10 * 12 + 5 * 18, 11 * 12 + 5 * 18]


def train_until_signalled(rank: int, world: int, config: JobConfig, number: int) -> None:
    """Trains until rank 1 sends itself the signal `number`, at some moment after the third step."""

    def tell() -> None:
        log = config.run_dir / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    if rank == 1:
        threading.Thread(target=tell, daemon=True).start()
    train_rank(rank, world, config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_one_rank_saves_on_all_ranks(tmp_path, number):
    data = write_tokens(tmp_path / "tokens")
    settings = {"train__steps": 100_000, "optim__schedule": "wsd"}
    run_ranks(2, train_until_signalled, tiny_config(data, tmp_path / "run", **settings), number)
    before = losses(tmp_path / "run")
    assert 3 <= len(before) < 100_000
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "run", train__stop_after=len(before) + 5, **settings))
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "straight", train__stop_after=len(before) + 5, **settings))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_finished_run_does_not_change(tmp_path):
    data = write_tokens(tmp_path / "tokens")
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "run"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "run"))
    assert files and files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert len(losses(tmp_path / "run")) == 20


def test_deadline_reserves_a_step_and_two_saves(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    longest = [0.0]
    deadline = Deadline(1100.0, reserve=10.0, longest_save=lambda: longest[0])
    now[0] = 1004.0
    assert not deadline(), "the step takes four seconds"
    now[0] = 1006.0
    longest[0] = 30.0
    assert deadline()  # 1.5 · (4 + 2·30) = 96 s needed, 94 s left
    longest[0] = 20.0
    now[0] = 1008.0
    assert not deadline()
    longest[0] = 0.0
    now[0] = 1089.0
    assert not Deadline(1100.0, reserve=10.0, longest_save=lambda: 0.0)()
    now[0] = 1090.0
    assert Deadline(1100.0, reserve=10.0, longest_save=lambda: 0.0)()


@pytest.mark.parametrize("text,seconds", [("4h", 14400), ("1d12h30m5s", 131405), ("90m", 5400), (None, None)])
def test_time_limit_is_parsed(text, seconds):
    assert TrainingConfig(time_limit=text).time_limit_seconds == seconds


def test_frozen_config_may_lack_only_newer_groups(tmp_path):
    frozen = asdict(tiny_config(tmp_path, tmp_path / "a"))
    del frozen["monitor"]
    assert build_config(OmegaConf.create(frozen)).monitor == MonitorConfig()
    del frozen["optim"]
    with pytest.raises(ValueError, match="optim is missing: a configuration has model, vocab, data"):
        build_config(OmegaConf.create(frozen))

"""A hook of your own: its moments, and the state that survives in checkpoints."""

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.state import matrix_dtensor
from pretrain.config.job import JobConfig
from pretrain.hooks import Hook, Run, registry
from tests.pretrain.tiny import VOCAB, saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

STEPS, STOP = 5, 3


class Counter(Hook):
    """Counts the steps in a number, and in each row of the matrix that this rank owns."""

    def __init__(self, run: Run) -> None:
        self.shard, self.mesh = run.parts.model.vocab.shard, run.parts.mesh
        self.steps, self.rows_v1 = 0, torch.zeros(self.shard.rows, 1)
        self.moments: list[str] = []

    def before_training(self, trainer) -> None:
        self.moments.append(f"begin at {trainer.state.step}")

    def before_step(self, trainer) -> None:
        self.weight = trainer.model.vocab.weight.detach().clone()
        self.moments.append("step")

    def before_update(self, trainer) -> None:
        unchanged = torch.equal(self.weight, trainer.model.vocab.weight)
        has_gradient = bool((trainer.model.vocab.weight.grad != 0).any())
        self.moments.append("update" if unchanged and has_gradient else "too late")

    def after_step(self, trainer, report) -> None:
        self.steps, self.rows_v1 = self.steps + 1, self.rows_v1 + 1
        changed = not torch.equal(self.weight, trainer.model.vocab.weight)
        self.moments.append(f"after {report.step}" if changed else "too early")
        report.scalars["counted"] = self.steps

    def state_dict(self):
        return {
            "monitor.steps": self.steps,
            "monitor.rows": matrix_dtensor(self.rows_v1, self.shard, self.mesh),
        }

    def load_state_dict(self, state) -> None:
        self.steps, self.rows_v1 = state["monitor.steps"], state["monitor.rows"].to_local()


def train_counting(rank: int, world: int, config: JobConfig) -> tuple[list[str], int, list[float]]:
    """Returns the moments it saw, and its counts at the end."""
    counters: list[Counter] = []

    def build(config: JobConfig, run: Run) -> Counter:
        counters.append(Counter(run))
        return counters[0]

    registry.BUILDERS = (build, *registry.BUILDERS)
    train_rank(rank, world, config)
    (counter,) = counters
    return counter.moments, counter.steps, counter.rows_v1.flatten().tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("hooks") / "tokens")


def test_a_hook_sees_every_moment_and_its_state_survives(data, tmp_path):
    settings = {"train__steps": STEPS, "eval__every": 0, "checkpoint__every": 1}
    run_ranks(2, train_counting, tiny_config(data, tmp_path / "run", train__stop_after=STOP, **settings))
    config = tiny_config(data, tmp_path / "run", train__micro_batch=2, **settings)
    moments = [moment for step in (4, 5) for moment in ("step", "update", f"after {step}")]
    for seen, steps, rows in run_ranks(3, train_counting, config):
        assert seen == [f"begin at {STOP}", *moments]
        assert steps == STEPS and rows == [STEPS] * len(rows)
    for folder in checkpoints(config.run_dir):
        manifest = read_manifest(folder)
        assert manifest["hooks"]["monitor.steps"] == manifest["step"]
    assert saved_tensors(config.run_dir)["monitor.rows"][:VOCAB].eq(STEPS).all()


@pytest.mark.parametrize("first,second", [(train_rank, train_counting), (train_counting, train_rank)])
def test_a_hook_with_state_can_be_added_and_removed(data, tmp_path, first, second):
    settings = {"train__steps": STEPS, "eval__every": 0}
    run_ranks(1, first, tiny_config(data, tmp_path / "run", train__stop_after=STOP, **settings))
    (result,) = run_ranks(1, second, tiny_config(data, tmp_path / "run", **settings))
    last = read_manifest(checkpoints(tmp_path / "run")[-1])
    assert ("monitor.steps" in last["hooks"]) == ("monitor.rows" in last["tensors"]) == (second is train_counting)
    assert result is None or result[1] == STEPS - STOP

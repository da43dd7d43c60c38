"""The guard against spikes: a run comes back by itself, and equals a run that was told to skip the same samples."""

import json
import math
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.token_file import TokenFileWriter
from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.state import TrainState
from pretrain.checks import check_job
from pretrain.commands.data import Request, show
from pretrain.config.guard import GuardConfig
from pretrain.config.job import JobConfig
from pretrain.data import open_data
from pretrain.exits import restarts_in
from pretrain.hooks.culprits import Culprits
from pretrain.hooks.guard import GuardHook, build
from pretrain.models.language_model import LanguageModel
from tests.pretrain.tiny import VOCAB, saved_tensors, tiny_config, train_rank
from tests.ranks import run_ranks

GUARD = {"guard__window": 16, "guard__threshold": 4.0, "guard__patience": 2, "guard__margin": 3}
BATCH = {"train__global_batch": 6, "train__micro_batch": 1}
FSDP2: dict[str, Any] = {}
MUON = {"optim__name": "muon"}  # clips before Newton-Schulz


def zero(stage: int, precision: str = "fp32") -> dict[str, Any]:
    return {"engine": {"name": "deepspeed", "zero_stage": stage}, "train__precision": precision}


def write_poisoned(prefix: Path) -> Path:
    """Writes documents that count in eight tokens. One document has random tokens, which the model learns
    never to expect: its windows are in several batches.
    """
    random = np.random.default_rng(0)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with TokenFileWriter(prefix, VOCAB) as file:
        for number in range(200):
            file.add(np.append((random.integers(8) + np.arange(47)) % 8, 8))
            if number == 100:
                file.add(random.integers(9, VOCAB, size=200))
    return prefix


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> Path:
    return write_poisoned(tmp_path_factory.mktemp("poisoned") / "tokens")


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def spikes_of(run: Path) -> list[dict]:
    return [line for line in restarts_in(run) if line["class"] == "SPIKE"]


def left_out(run: Path) -> list[list[int]]:
    return read_manifest(checkpoints(run)[-1])["left_out"]


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = saved_tensors(run), saved_tensors(other)
    names = {name for name in ours if not name.startswith("monitor.")}
    assert names == {name for name in theirs if not name.startswith("monitor.")}
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("world,engine", [(1, FSDP2), (3, FSDP2), (2, zero(1, "auto"))])
def test_poisoned_batch_is_left_out(poisoned, tmp_path, world, engine):
    settings = {"train__steps": 44, **BATCH, **GUARD, **engine}
    run_ranks(world, train_rank, tiny_config(poisoned, tmp_path / "run", **settings))
    gone, spikes = left_out(tmp_path / "run"), spikes_of(tmp_path / "run")
    assert gone and all("batch left out" in spike["decision"] for spike in spikes)
    assert all(any("document 101" in name for name in spike["documents"]) for spike in spikes)
    run_ranks(world, train_rank, tiny_config(poisoned, tmp_path / "told", data__skip=gone, **settings))
    assert not spikes_of(tmp_path / "told")
    assert_same_weights(tmp_path / "run", tmp_path / "told")
    logged = [line for line in lines_of(tmp_path / "run") if "guard_spikes" in line]
    assert sum(line["guard_spikes"] for line in logged) == len(spikes)
    assert logged[-1]["guard_left_out"] == sum(stop - first for first, stop in gone)


def train_with_nan(rank: int, world: int, config: JobConfig, call: int) -> None:
    """Trains, but the body's output for one micro-batch of rank 0 is not a number. call: its number, from 1."""
    calls, loss_of = count(1), LanguageModel.loss

    def broken(model: LanguageModel, *args: Any) -> Any:
        body = model.body
        if rank == 0 and next(calls) == call:
            model.body = lambda *inputs: body(*inputs) * math.nan
        try:
            return loss_of(model, *args)
        finally:
            model.body = body

    LanguageModel.loss = broken  # type: ignore[method-assign]
    train_rank(rank, world, config)


@pytest.mark.parametrize("engine", [MUON, zero(0), zero(2) | MUON, zero(3)])
def test_batch_whose_loss_is_not_a_number_is_left_out(poisoned, tmp_path, engine):
    """The second of three micro-batches of step 3: sums and moments must not keep a part of it."""
    settings = {"train__steps": 5, **BATCH, **engine}
    run_ranks(2, train_with_nan, tiny_config(poisoned, tmp_path / "run", **settings), 3 + 3 + 2)
    assert left_out(tmp_path / "run") == [[12, 18]]
    (spike,) = spikes_of(tmp_path / "run")
    assert (spike["step"], spike["decision"], spike["worst"]) == (3, "batch left out", [14])
    assert spike["loss"] is None and spike["why"].endswith("loss nan, gradient norm nan")
    run_ranks(2, train_rank, tiny_config(poisoned, tmp_path / "told", data__skip=[[12, 18]], **settings))
    assert_same_weights(tmp_path / "run", tmp_path / "told")


def test_batch_left_out_where_batches_grow_equals_the_told_run(poisoned, tmp_path):
    """Larger batches begin inside the one that is left out: both runs take them from the first sample after it."""
    grow = {"train__batch_schedule": {"15 samples": 12}}
    settings = {"train__steps": 5, **BATCH, **grow}
    run_ranks(2, train_with_nan, tiny_config(poisoned, tmp_path / "run", **settings), 3 + 3 + 2)
    assert left_out(tmp_path / "run") == [[12, 18]]
    told = settings | {"data__skip": [[12, 18]]}
    for stop in (2, 5):  # the first ends before the samples that are left out
        run_ranks(2, train_rank, tiny_config(poisoned, tmp_path / "told", train__stop_after=stop, **told))
    assert_same_weights(tmp_path / "run", tmp_path / "told")
    for name, given in (("run", settings), ("told", told)):
        config = tiny_config(poisoned, tmp_path / name, **given)
        assert read_manifest(checkpoints(tmp_path / name)[-1])["step"] == 5
        for step, numbers in ((3, "18 to 29"), (5, "42 to 53")):
            shown = show(Request(config, tmp_path / name, step, None, 1), coloured=False)
            assert next(shown) == f"step {step}: samples {numbers}"
    later = settings | {"train__batch_schedule": {"15 samples": 12, "36 samples": 18}}  # step 5 took 12 from 42 on
    with pytest.raises(ValueError, match=r"holds a run with batches of .* which differ below sample 54, its position"):
        check_job(tiny_config(poisoned, tmp_path / "run", **later), 2, "cpu")


def test_warn_changes_nothing_and_clip_limits_the_gradient(poisoned, tmp_path):
    settings = {"train__steps": 44, **BATCH, **GUARD, "optim__clip": 0.0}
    for level in ("off", "warn"):
        run_ranks(1, train_rank, tiny_config(poisoned, tmp_path / level, guard__level=level, **settings))
    assert_same_weights(tmp_path / "off", tmp_path / "warn")
    spikes = spikes_of(tmp_path / "warn")
    assert spikes and {spike["decision"] for spike in spikes} == {"warning"} and not spikes_of(tmp_path / "off")
    step, norms = spikes[0]["step"], [line["grad_norm"] for line in lines_of(tmp_path / "warn")]
    usual = math.exp(float(np.median(np.log(norms[step - 1 - 16 : step - 1]))))
    assert norms[step - 1] > 1.01 * usual

    limits = {"guard__level": "clip", "checkpoint__every": step - 1, "train__stop_after": step}
    run_ranks(1, train_rank, tiny_config(poisoned, tmp_path / "clip", **settings | limits))
    (spike,) = spikes_of(tmp_path / "clip")
    assert spike["decision"] == "gradient limited to the median norm" and spike["rows"]
    before, after = (saved_tensors(tmp_path / "clip", folder) for folder in checkpoints(tmp_path / "clip"))
    gradients = [(after[name] - 0.9 * before[name]) / 0.1 for name in after if name.startswith("optim.exp_avg.")]
    assert math.sqrt(sum(float(g.double().square().sum()) for g in gradients)) == pytest.approx(usual, rel=1e-4)


@pytest.mark.parametrize("world,engine", [(2, FSDP2), (2, zero(2))])
def test_run_returns_from_a_learning_rate_spike(poisoned, tmp_path, world, engine):
    """One step at a hundred times the learning rate, given at a resume, damages the weights."""
    rules = {"guard__level": "rollback", "checkpoint__every": 8, "ema__decay": 0.9}
    settings = {"train__steps": 44, **BATCH, **GUARD, **engine, **rules}
    for changes in ({"train__stop_after": 33}, {"train__stop_after": 34, "optim__lr": 1.0}, {}):
        run_ranks(world, train_rank, tiny_config(poisoned, tmp_path / "run", **settings | changes))
    *others, back = [spike["decision"] for spike in spikes_of(tmp_path / "run") if spike["step"] == 35]
    assert others == ["batch left out"] * 2 and back.startswith("back to step 24, without samples 186 to ")
    newest = read_manifest(checkpoints(tmp_path / "run")[-1])
    assert newest["step"] == 44 and newest["rollbacks"] == 1
    assert [line["step"] for line in lines_of(tmp_path / "run")] == list(range(1, 45))
    told = tiny_config(poisoned, tmp_path / "told", data__skip=newest["left_out"], **settings)
    run_ranks(world, train_rank, told)
    assert_same_weights(tmp_path / "run", tmp_path / "told")


def test_a_hopeless_run_ends_with_the_error_of_its_norm(poisoned, tmp_path):
    """A rate of 1e20 makes every later norm not finite: the guard leaves out two batches, and then gives up."""
    config = tiny_config(poisoned, tmp_path / "run", **BATCH, **GUARD, optim__lr=1e20, optim__warmup_steps=0)
    with pytest.raises(AssertionError, match=r"FloatingPointError: the gradient's norm is (nan|inf) and the loss"):
        run_ranks(2, train_rank, config)
    decisions = [spike["decision"] for spike in spikes_of(tmp_path / "run")]
    assert decisions == ["batch left out", "batch left out", "the run ends"]


def trainer_at(step: int, position: int) -> Any:
    return SimpleNamespace(state=TrainState(step, samples={"a": position}), must_stop=lambda: False)


def test_a_stop_after_a_batch_left_out_keeps_the_margin():
    """The position has moved without a step: a resumed run rolls back to where the other would."""
    hook, resumed = (GuardHook(GuardConfig(margin=3), None, [], 5) for _ in range(2))
    for step in range(7, 11):
        hook.after_step(trainer_at(step, 4 * step), None)
    resumed.load_state_dict(hook.state_dict())
    resumed.before_training(trainer_at(10, 44))
    assert [*resumed.steps] == [*hook.steps] == [(7, 28), (8, 32), (9, 36), (10, 40)]


def test_another_loss_starts_another_window(tmp_path):
    changes = [{}, {}, {"vocab__label_smoothing": 0.1}, {"vocab__z_loss": 1e-4}, {"train__global_batch": 24}]
    run = SimpleNamespace(data=SimpleNamespace(corpora={}))
    hooks = [build(tiny_config(tmp_path, tmp_path, **some), run) for some in changes]
    assert hooks[0].data == hooks[1].data and len({hook.data for hook in hooks}) == 4


def test_samples_that_were_skipped_are_not_the_guards():
    hook = GuardHook(GuardConfig(), None, [], 5, [[12, 100]])
    hook.news["guard_spikes"] = 1
    trainer, report = trainer_at(3, 102), SimpleNamespace(scalars={})
    trainer.state.left_out = [[10, 102]]
    hook.after_step(trainer, report)
    assert report.scalars["guard_left_out"] == 4


def test_a_new_guard_returns_to_before_its_margin():
    """It has not seen the positions of the steps before the spike: samples are left out from the checkpoint's on."""
    asked = []

    def roll_back(last: int, left_out: Any, rollbacks: int) -> TrainState:
        loaded = TrainState(90, samples={"a": 360})
        asked.append((last, left_out(loaded), rollbacks))
        return loaded

    for seen, begin in ((100, 360), (92, 372)):
        run = SimpleNamespace(log=None, manager=SimpleNamespace(roll_back=roll_back))
        hook, trainer = GuardHook(GuardConfig(level="rollback", margin=8), run, [], 5), trainer_at(100, 404)
        for step in range(seen, 101):
            hook.after_step(trainer_at(step, 4 * step + 4), None)
        trainer.batches = SimpleNamespace(samples=SimpleNamespace(without=list), restart=lambda *_: None)
        assert hook._roll_back(trainer, None, "", Culprits([404, 408], [404], [], []))
        assert asked[-1] == (92, [[begin, 408]], 1) and trainer.state.step == 90


def test_changing_left_out_samples_of_the_past_is_refused(poisoned, tmp_path):
    settings = {"train__steps": 6, **BATCH}
    run_ranks(1, train_rank, tiny_config(poisoned, tmp_path / "run", train__stop_after=2, **settings))
    past = tiny_config(poisoned, tmp_path / "run", data__skip=[[11, 14]], **settings)
    with pytest.raises(AssertionError, match=r"data.skip=\[\[11, 14\]\] must not change samples below 12"):
        run_ranks(1, train_rank, past)
    run_ranks(1, train_rank, tiny_config(poisoned, tmp_path / "run", data__skip=[[12, 14]], **settings))
    assert sum(read_manifest(checkpoints(tmp_path / "run")[-1])["samples"].values()) == 6 * 6 + 2


def test_history_survives_a_move_of_the_corpus(poisoned, tmp_path):
    moved = shutil.copytree(poisoned.parent, tmp_path / "moved") / poisoned.name
    with TokenFileWriter(tmp_path / "other", VOCAB) as file:
        file.add(np.arange(400) % 8)
    marks = []
    for path in (poisoned, moved, tmp_path / "other"):
        config = tiny_config(path, tmp_path / "run", guard__level="warn")
        hook = build(config, SimpleNamespace(data=open_data(config.data)))
        marks.append(hook.data)
    assert marks[0] == marks[1] != marks[2]

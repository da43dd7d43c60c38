"""A matrix that is split during a run: both halves are copies, and train as in a dense process."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.build import vocab_workload
from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checks import check_job
from pretrain.config.job import JobConfig
from pretrain.data import IGNORED
from pretrain.optim import lr_at
from tests.pretrain.dense import DenseModel, windows_of
from tests.pretrain.tiny import VOCAB, saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

AT, STEPS = 4, 9
SETTINGS = {"train__steps": STEPS, "vocab__untie_at": AT, "optim__eps": 1e-5, "checkpoint__every": 1}
ZERO3 = {"name": "deepspeed", "zero_stage": 3}
SCALES = {"vocab__embed_scale": 3.0, "vocab__input_grad_scale": 0.25}


class Truth(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    distance: float
    cosine: float


def dense_untied_training(config: JobConfig) -> Truth:
    """Trains in float64 with AdamW written out, so that the copies of the split are visible."""
    model = DenseModel(config, torch.float64)
    parameters: dict[str, Tensor] = dict(model.body.named_parameters()) | {"embedding.weight": model.weight}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    optim, losses = config.optim, []
    for step in range(config.train.steps):
        if step == config.vocab.untie_at:
            model.head_weight = nn.Parameter(model.weight.detach().clone())
            parameters["head.weight"] = model.head_weight
            first["head.weight"], second["head.weight"] = (m["embedding.weight"].clone() for m in (first, second))
        tokens, targets = windows_of(config, step)
        hidden = F.embedding(tokens, model.weight) * config.vocab.embed_scale
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * config.vocab.input_grad_scale)
        head = model.weight if model.head_weight is None else model.head_weight
        logits = model.body(hidden) @ head[:VOCAB].T
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        losses.append(float(loss.detach()))
        for p in parameters.values():
            p.grad = None
        loss.backward()
        norm = sum(float(p.grad.square().sum()) for p in parameters.values()) ** 0.5
        factor, lr = min(1.0, optim.clip / (norm + 1e-6)), lr_at(optim, step, config.train.steps)
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = p.grad * factor
                p *= 1 - lr * (optim.weight_decay if p.dim() >= 2 else 0.0)
                first[name].lerp_(gradient, 1 - optim.beta1)
                second[name].mul_(optim.beta2).addcmul_(gradient, gradient, value=1 - optim.beta2)
                bias1, bias2 = 1 - optim.beta1 ** (step + 1), 1 - optim.beta2 ** (step + 1)
                p -= lr / bias1 * first[name] / ((second[name] / bias2).sqrt() + optim.eps)
    weights = {name: p.detach() for name, p in parameters.items()}
    one, other = weights["embedding.weight"][:VOCAB], weights["head.weight"][:VOCAB]
    cosine = float(F.cosine_similarity(one, other).mean())
    return Truth(losses, weights, float((other - one).norm() / one.norm()), cosine)


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("untie") / "tokens")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """Trains on two ranks with several micro-batches, and splits during the run."""
    run = tmp_path_factory.mktemp("straight") / "run"
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS))
    return run


@pytest.mark.parametrize(
    "world,parallel,engine,scales",
    [(1, 1, None, SCALES), (2, 2, None, {}), (2, 1, ZERO3, SCALES), (3, 3, None, SCALES), (4, 2, None, SCALES)],
)
def test_a_split_run_is_the_dense_one(data, tmp_path, world, parallel, engine, scales):
    settings = SETTINGS | scales | {"vocab__parallel": parallel, "train__micro_batch": 2 if world == 3 else 3}
    config = tiny_config(data, tmp_path / "run", **settings, **({"engine": engine} if engine else {}))
    truth = dense_untied_training(config)
    run_ranks(world, train_rank, config)
    lines = lines_of(config.run_dir)
    np.testing.assert_allclose([line["loss"] for line in lines], truth.losses, rtol=1e-5)
    assert ["tie_distance" in line for line in lines] == [False] * AT + [True] * (STEPS - AT)
    assert lines[-1]["tie_distance"] == pytest.approx(truth.distance, rel=1e-3) and truth.distance > 0.01
    assert lines[-1]["tie_cosine"] == pytest.approx(truth.cosine, rel=1e-4)
    for name, weight in truth.weights.items():
        saved = saved_tensors(config.run_dir)[name].double()
        assert float((saved[: len(weight)] - weight).norm() / weight.norm()) < 2e-5, name


def test_a_checkpoint_of_the_step_of_the_split_is_whole_and_the_next_has_two_matrices(straight):
    has_head = {
        read_manifest(folder)["step"]: "head.weight" in read_manifest(folder)["tensors"]
        for folder in checkpoints(straight)
    }
    assert has_head == {step: step > AT for step in range(1, STEPS + 1)}


def at_split(rank: int, world: int, config: JobConfig) -> list[bool]:
    """True if both halves and their moments have the same bits when the step after the split begins."""
    from pretrain.trainer import Trainer

    seen: list[bool] = []
    step = Trainer.train_step

    def watched(self, batch, targets):
        if self.state.step == AT:
            vocab, optimizer = self.model.vocab, self.vocab_optimizer.optimizer
            one, other = optimizer.state_of(vocab.weight), optimizer.state_of(vocab.head_weight)
            seen.extend(torch.equal(one[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
            seen.append(torch.equal(vocab.weight, vocab.head_weight) and vocab.weight is not vocab.head_weight)
            seen.append(one["exp_avg"].data_ptr() != other["exp_avg"].data_ptr())
            seen.append(bool((one["exp_avg"] != 0).any()))
        return step(self, batch, targets)

    Trainer.train_step = watched
    train_rank(rank, world, config)
    return seen


def test_both_halves_begin_as_the_same_bits(data, tmp_path):
    for seen in run_ranks(2, at_split, tiny_config(data, tmp_path / "run", **SETTINGS | {"train__stop_after": AT + 1})):
        assert seen == [True] * 6


def assert_same_run(run: Path, straight: Path) -> None:
    """Compares bits."""
    keys = ("loss", "grad_norm", "tie_distance", "tie_cosine")
    for one, other in zip(lines_of(run), lines_of(straight), strict=True):
        assert [one.get(key) for key in keys] == [other.get(key) for key in keys]
    parts, whole = saved_tensors(run), saved_tensors(straight)
    assert parts.keys() == whole.keys() >= {"head.weight", "optim.exp_avg.head.weight", "optim.exp_avg_sq.head.weight"}
    for name, tensor in whole.items():
        assert torch.equal(parts[name], tensor), name


@pytest.mark.parametrize("stop", [AT - 1, AT, AT + 1])
def test_resuming_is_exact_before_at_and_after_the_split(data, straight, tmp_path, stop):
    run = tmp_path / "run"
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS, train__stop_after=stop))
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS))
    assert_same_run(run, straight)


@pytest.mark.parametrize("engine", [{"name": "fsdp2"}, ZERO3])
def test_resuming_at_the_split_is_exact_in_bf16_and_by_either_engine(data, tmp_path, engine):
    """Uses bf16 if the device has it."""
    settings = SETTINGS | {"train__precision": "auto", "engine": engine}
    for run, stops in (("straight", [STEPS]), ("parts", [AT, STEPS])):
        for stop in stops:
            run_ranks(2, train_rank, tiny_config(data, tmp_path / run, **settings, train__stop_after=stop))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


@pytest.mark.parametrize("stop,world,engine", [(AT - 1, 4, None), (AT, 1, None), (AT + 1, 3, None), (AT + 1, 2, ZERO3)])
def test_resuming_at_another_world_size_and_engine(data, straight, tmp_path, stop, world, engine):
    run, changed = tmp_path / "run", {"engine": engine} if engine else {}
    changed |= {"train__micro_batch": 2} if world == 3 else {}
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS, train__stop_after=stop))
    run_ranks(world, train_rank, tiny_config(data, run, **SETTINGS, **changed))
    np.testing.assert_allclose(
        [line["loss"] for line in lines_of(run)], [line["loss"] for line in lines_of(straight)], rtol=1e-5
    )


def forked(straight: Path, run: Path, step: int) -> Path:
    """Copies the run as it was at that step."""
    for folder in checkpoints(straight):
        if read_manifest(folder)["step"] <= step:
            shutil.copytree(folder, run / "checkpoints" / folder.name)
    return run


@pytest.mark.parametrize(
    "step,changes,allowed",
    [
        (AT, {"vocab__untie_at": None}, True),
        (AT, {"vocab__untie_at": AT + 2}, True),
        (AT, {"vocab__untie_at": AT - 1}, False),
        (AT + 1, {"vocab__untie_at": None}, False),
        (AT + 1, {"vocab__untie_at": AT + 1}, False),
        (AT + 1, {"vocab__tie": "untied", "vocab__untie_at": None}, False),
        (AT, {"vocab__embed_scale": 2.0}, False),
        (AT, {"vocab__input_grad_scale": 0.5}, True),
    ],
)
def test_a_split_may_be_put_off_but_not_undone(data, straight, tmp_path, step, changes, allowed):
    config = tiny_config(data, forked(straight, tmp_path / "run", step), **SETTINGS | changes)
    if allowed:
        check_job(config, 2, "cpu")
        return
    with pytest.raises(ValueError, match=r"^run\.dir=.* holds a run with vocab\.\w+=.*, this command has "):
        check_job(config, 2, "cpu")


def test_a_tied_run_can_be_split_later_on(data, straight, tmp_path):
    """A run tied so far, then split, equals the run with the split planned from the start."""
    run = tmp_path / "run"
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS | {"vocab__untie_at": None}, train__stop_after=AT))
    run_ranks(2, train_rank, tiny_config(data, run, **SETTINGS))
    assert lines_of(run)[-1]["loss"] == lines_of(straight)[-1]["loss"]


def test_a_split_beyond_the_end_is_named(data, tmp_path):
    with pytest.raises(ValueError, match=r"^vocab\.untie_at=9 must be below train\.steps=9$"):
        tiny_config(data, tmp_path / "run", **SETTINGS | {"vocab__untie_at": STEPS})


@pytest.mark.parametrize(
    "changes,lines",
    [
        ({}, "0.0M parameters, 0.0M of them in 1 matrix of 307 rows (tied) up to step 4, then"),
        ({"vocab__untie_at": None}, "1 matrix of 307 rows (tied; untied: "),
        ({"vocab__untie_at": None, "vocab__tie": "untied"}, "2 matrices of 307 rows (untied; tied: "),
    ],
)
def test_parameters_are_counted_for_both_choices(data, tmp_path, changes, lines):
    from pretrain.announce import parameters

    config = tiny_config(data, tmp_path / "run", **SETTINGS | changes)
    assert lines in parameters(config, 14_000, VOCAB * 24, VOCAB)
    assert vocab_workload(config, VOCAB, 2, 4).matrices == (1 if "(tied; " in lines else 2)

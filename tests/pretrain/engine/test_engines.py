"""Engines match one dense process, at every stage and on any number of ranks."""

import json
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.build import build_model
from pretrain.config.job import JobConfig
from pretrain.config.training import TrainingConfig
from pretrain.mesh import Mesh
from pretrain.precision import compute_dtype
from tests.pretrain.dense import Dense, DenseModel, dense_training
from tests.pretrain.tiny import VOCAB, saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # otherwise ZeRO-3 would not shard a small body
ENGINES: dict[str, dict[str, object]] = {
    "fsdp2": {"name": "fsdp2"},
    "hsdp": {"name": "fsdp2", "hsdp": True},
    "zero0": {"name": "deepspeed", "zero_stage": 0},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3, "extra": CUT},
}
STEPS = 10
BF16 = compute_dtype(TrainingConfig(), "cpu") is torch.bfloat16
PRECISIONS = ("fp32", "auto") if BF16 else ("fp32",)  # without native bf16 both are the same
# Four ranks are slow, and tie and accumulation do not depend on the number of ranks.
LAYOUTS = [(world, tie, n) for n in (1, 2) for tie in ("tied", "untied") for world in (1, 2)] + [(4, "untied", 2)]
SIZES = {
    "train__steps": STEPS,
    "train__global_batch": 24,
    "model__width": 21,  # not divisible by any number of ranks: shards differ in size or are padded
    "model__context": 15,
    "optim__eps": 1e-5,  # the gradient of a key's bias is rounding noise, which a smaller eps would amplify
}


class Run(NamedTuple):
    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor]


def config_of(
    run: Path, world: int, accumulation: int = 1, engine: str = "fsdp2", more: dict | None = None, **changes: object
) -> JobConfig:
    """Configuration with the tokens beside the run; half of the ranks share a matrix. more: settings of the engine."""
    settings = SIZES | {
        "engine": ENGINES[engine] | (more or {}),
        "vocab__parallel": max(1, world // 2),
        "train__micro_batch": 24 // world // accumulation,
    }
    return tiny_config(run.parent / "tokens", run, **settings | changes)


def train_ranks(rank: int, world: int, configs: list[JobConfig]) -> None:
    """Trains several runs, one after the other, in the same processes."""
    for config in configs:
        train_rank(rank, world, config)


def outcome(run: Path) -> Run:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return Run([line["loss"] for line in lines], [line["grad_norm"] for line in lines], saved_tensors(run))


def apart(one: Tensor, other: Tensor) -> float:
    """Relative distance ‖one - other‖ / ‖other‖."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def assert_same(one: Run, other: Run, relative: float) -> None:
    np.testing.assert_allclose(one.losses, other.losses, rtol=relative)
    np.testing.assert_allclose(one.norms, other.norms, rtol=relative)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in other.tensors.items():
        assert apart(one.tensors[name], tensor) <= relative, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    write_tokens(folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def truth(folder) -> Callable[[str], Dense]:
    return cache(lambda tie: dense_training(config_of(folder / "dense", 1, vocab__tie=tie)))


@pytest.fixture(scope="module")
def trained(folder) -> Callable[[str, int, str, int], Run]:
    """Returns one run of an engine and world size; all runs of both are trained together."""

    @cache
    def train(engine: str, world: int) -> None:
        configs = [
            config_of(folder / f"{engine}-{world}-{tie}-{n}", world, n, engine, vocab__tie=tie)
            for ranks, tie, n in LAYOUTS
            if ranks == world
        ]
        run_ranks(world, train_ranks, configs, timeout=120)

    def run(engine: str, world: int, tie: str, accumulation: int) -> Run:
        train(engine, world)
        return outcome(folder / f"{engine}-{world}-{tie}-{accumulation}")

    return run


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world,tie,accumulation", LAYOUTS)
def test_ten_steps_match_dense(truth, trained, world, engine, tie, accumulation):
    run, dense = trained(engine, world, tie, accumulation), truth(tie)
    assert len(run.losses) == STEPS and min(dense.norms) > 0.5, "the clip must be active"
    np.testing.assert_allclose(run.losses, dense.losses, rtol=1e-5)
    np.testing.assert_allclose(run.norms, dense.norms, rtol=1e-5)
    for name, weight in dense.weights.items():
        assert apart(run.tensors[name], weight) <= 1e-5, name


def test_resume_with_other_engine_stage_and_world_size(folder):
    run_ranks(2, train_rank, config_of(folder / "straight", 2, train__steps=20))
    for stop, engine, world in ((5, "fsdp2", 2), (10, "zero3", 4), (15, "zero1", 1), (20, "fsdp2", 2)):
        link = config_of(folder / "chain", world, engine=engine, train__steps=20, train__stop_after=stop)
        run_ranks(world, train_rank, link)
    chain = outcome(folder / "chain")
    assert sum(name.startswith(("optim.exp_avg.", "optim.exp_avg_sq.")) for name in chain.tensors) == 2 * 28
    assert_same(chain, outcome(folder / "straight"), 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_exact(folder, engine):
    """Resumes in new processes, with several micro-batches, in fp32 and, if supported, in bf16."""
    whole, first, second = [], [], []
    for precision in PRECISIONS:
        settings = {"world": 2, "accumulation": 2, "engine": engine, "train__precision": precision}
        settings |= {"train__steps": 6}
        whole.append(config_of(folder / f"{engine}-{precision}-whole", **settings))
        second.append(config_of(folder / f"{engine}-{precision}-parts", **settings))
        first.append(config_of(folder / f"{engine}-{precision}-parts", **settings, train__stop_after=3))
    run_ranks(2, train_ranks, whole + first, timeout=120)
    run_ranks(2, train_ranks, second, timeout=120)
    for parts, straight in zip(second, whole, strict=True):
        assert_same(outcome(parts.run_dir), outcome(straight.run_dir), 0.0)


SAVERS: dict[str, list[dict[str, object]]] = {
    "fsdp2": [{"reshard_after_forward": False}],
    "hsdp": [],
    "zero0": [],
    "zero1": [],
    "zero2": [{"offload": "cpu"}],
    "zero3": [{"offload": "cpu"}, {"extra": {"zero_optimization": {"overlap_comm": False}}}],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_savings_keep_results(folder, trained, engine):
    # selective first: at stage 3 the other kinds replace F.linear for the rest of the process
    kinds: list[dict[str, object]] = [{"activation_checkpointing": kind} for kind in ("selective", "block")]
    configs = [
        config_of(folder / f"{engine}-saver-{i}", 2, 2, engine, change)
        for i, change in enumerate(kinds + SAVERS[engine])
    ]
    run_ranks(2, train_ranks, configs, timeout=120)
    for config in configs:
        assert_same(outcome(config.run_dir), trained(engine, 2, "tied", 2), 1e-6)


def test_compiled_blocks_keep_results(folder, trained):
    """Compiles without activation checkpointing; models/test_llama.py tests both together, on one rank."""
    run = folder / "compiled"
    run_ranks(2, train_rank, config_of(run, 2, 2, more={"compile": True}), timeout=300)
    assert_same(outcome(run), trained("fsdp2", 2, "tied", 2), 1e-5)


def test_engines_agree_in_bf16(folder, truth):
    """Ten steps in bf16 match fp32: losses to 0.1%, norms to 2%, weights to 2⁻⁷. One rounding to bf16 is 2⁻⁹."""
    engines = ENGINES if BF16 else ("fsdp2",)  # without bf16 this is an fp32 run, as above
    configs = [config_of(folder / f"{engine}-bf16", 2, engine=engine, train__precision="auto") for engine in engines]
    run_ranks(2, train_ranks, configs, timeout=180)
    dense = truth("tied")
    for config in configs:
        run = outcome(config.run_dir)
        np.testing.assert_allclose(run.losses, dense.losses, rtol=1e-3)
        np.testing.assert_allclose(run.norms, dense.norms, rtol=2e-2)
        weights = torch.cat([run.tensors[name].flatten() for name in dense.weights])
        assert apart(weights, torch.cat([weight.flatten() for weight in dense.weights.values()])) < 2**-7


def initial_states(rank: int, world: int, configs: list[JobConfig]) -> list[dict[str, Tensor]]:
    """Returns the engine's whole state before the first step."""
    mesh = Mesh.of(2, torch.device("cpu"))
    engines = [build_model(config, mesh, VOCAB)[0] for config in configs]
    return [{name: tensor.full_tensor() for name, tensor in engine.state().items()} for engine in engines]


@pytest.mark.parametrize("engine", ENGINES)
def test_initial_weights_are_equal_in_every_precision(folder, engine):
    configs = [config_of(folder / "initial", 4, engine=engine, train__precision=name) for name in PRECISIONS]
    body = DenseModel(configs[0], torch.float32).body
    for states in run_ranks(4, initial_states, configs):
        for state in states:
            assert len(state) == 3 * len(list(body.parameters()))
            for name, parameter in body.named_parameters():
                assert torch.equal(state[name], parameter), name
            assert all((tensor == 0).all() for name, tensor in state.items() if name.startswith("optim."))


def gathered_at_once(rank: int, world: int, config: JobConfig) -> int:
    """Largest number of whole parameters or moments alive during `engine.state()`."""
    engine, _, _ = build_model(config, Mesh.of(1, torch.device("cpu")), VOCAB)
    alive: list[weakref.ref] = []
    most = 0
    read = engine.weights.read

    def watched(parameter, kind):
        nonlocal most
        whole = read(parameter, kind)
        alive.append(weakref.ref(whole.untyped_storage()))
        most = max(most, sum(storage() is not None for storage in alive))
        return whole

    engine.weights.read = watched
    state = engine.state()
    assert len(alive) == len(state) > 0
    return most


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_state_gathers_one_parameter_at_a_time(folder, engine):
    """Allows two whole parameters, because gloo's thread may still hold the previous one."""
    most = run_ranks(2, gathered_at_once, config_of(folder / "gathered", 2, engine=engine, vocab__parallel=1))
    assert max(most) <= 2


@pytest.mark.parametrize(
    "engine,kind,packing",
    [
        ("fsdp2", "none", "none"),
        ("fsdp2", "block", "best_fit"),
        ("hsdp", "selective", "none"),
        ("zero0", "none", "none"),
        ("zero3", "block", "best_fit"),
    ],
)
def test_masked_documents_match_separate_documents(folder, engine, kind, packing):
    """The dense reference runs the documents of each window separately.

    In Adam's first steps, the update is the gradient divided by its own size. For gradients near 0 this amplifies
    rounding errors, which depend on the processor. A larger eps limits them.
    """
    settings = {"data__documents": "masked", "data__packing": packing, "train__steps": 4, "optim__eps": 1e-4}
    run = folder / f"masked-{engine}-{kind}"
    config = config_of(run, 2, 2, engine, {"activation_checkpointing": kind}, **settings)
    run_ranks(2, train_rank, config, timeout=120)
    ours, truth = outcome(run), dense_training(config_of(folder / "dense", 1, **settings))
    np.testing.assert_allclose(ours.losses, truth.losses, rtol=1e-6)
    np.testing.assert_allclose(ours.norms, truth.norms, rtol=1e-5)
    for name, tensor in truth.weights.items():
        assert apart(ours.tensors[name][: len(tensor)], tensor) <= 5e-5, name  # biases are still near 0

"""Loss and norm of a large matrix do not depend on the engine or the number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pretrain.build import build_model
from pretrain.config.job import JobConfig
from pretrain.config.optim import OptimConfig
from pretrain.mesh import Mesh
from pretrain.optim import VocabOptimizer
from pretrain.vocab.gradients import sum_of_squares
from tests.pretrain.engine.test_engines import ENGINES, train_ranks
from tests.pretrain.tiny import tiny_config, write_tokens
from tests.ranks import run_ranks

VOCAB = 50257
LAYOUTS = {  # by the number of ranks: engines, and ranks per copy of the matrix
    1: [("fsdp2", 1)],
    2: [("fsdp2", 1), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
    4: [("fsdp2", 2), ("fsdp2", 4)],
}
STEPS = 5


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("norms") / "tokens", VOCAB)


def config_of(tokens: Path, run: Path, engine: str, vocab_parallel: int, **changes: object) -> JobConfig:
    """Configuration with a matrix of 3 million numbers and the default learning rate and clip."""
    settings: dict[str, object] = {
        "vocab__size": VOCAB,
        "vocab__parallel": vocab_parallel,
        "model__layers": 1,
        "model__width": 64,
        "model__heads": 2,
        "optim__lr": 6e-4,
        "optim__clip": 1.0,
        "train__steps": STEPS,
        "train__global_batch": 8,
        "train__micro_batch": 2,
        "engine": ENGINES[engine],
    }
    return tiny_config(tokens, run, **settings | changes)


def test_loss_and_norm_agree_for_every_layout_and_engine(tokens):
    runs = {}
    for world, layouts in LAYOUTS.items():
        configs = [
            config_of(tokens, tokens.parent / f"{engine}-{world}x{vocab_parallel}", engine, vocab_parallel)
            for engine, vocab_parallel in layouts
        ]
        run_ranks(world, train_ranks, configs, timeout=120)
        for config in configs:
            lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
            runs[config.run_dir.name] = [[line["loss"], line["grad_norm"]] for line in lines]
    alone = runs.pop("fsdp2-1x1")
    assert len(alone) == STEPS and max(norm for _, norm in alone) > 1, "the clip must be active"
    for name, run in runs.items():
        np.testing.assert_allclose(run, alone, rtol=2e-6, err_msg=name)


def stepped_norms(rank: int, world: int, config: JobConfig) -> tuple[float, float]:
    """Returns the norm of one backward's gradient, and of the optimizer's gradient after a clip by 1/2."""
    engine, model, _ = build_model(config, Mesh.of(1, torch.device("cpu")), VOCAB)
    hidden_BTD = torch.randn(2, 16, config.model.width, generator=torch.Generator().manual_seed(rank))
    hidden_BTD = hidden_BTD.to(model.vocab.compute_dtype).requires_grad_()
    engine.backward(model.body(hidden_BTD).square().sum(), last_micro_batch=True)
    whole = float(engine.grad_norm())
    handed = torch.zeros((), dtype=torch.float64)

    def count(*_):
        for group in engine.optimizer.stepper.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
                handed.add_(gradient.double().square().sum())

    def counted(update=engine.optimizer.update):
        count()
        update()

    engine.optimizer.stepper.register_step_pre_hook(count)  # DeepSpeed calls torch's step, other engines `update`
    engine.optimizer.update = counted
    engine.step(1e-3, clip=0.5)
    if config.engine.title != "deepspeed ZeRO-0":  # at stage 0 every rank has all gradients
        dist.all_reduce(handed)
    return whole, float(handed.sqrt())


@pytest.mark.parametrize("engine", ["fsdp2", "zero0", "zero1", "zero2", "zero3", "zero2 offload", "zero3 offload"])
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_optimizer_gets_clipped_gradient(tokens, engine, precision):
    """Uses a block of 3 million numbers."""
    name, *offload = engine.split()
    config = config_of(tokens, tokens.parent / "clip", name, 1, model__width=512, train__precision=precision)
    if offload:
        config.engine.offload = "cpu"
    results = run_ranks(2, stepped_norms, config)
    assert results[0] == results[1]
    whole, handed = results[0]
    assert handed == pytest.approx(whole / 2, rel=1e-12)


def matrix_norm(rank: int, world: int, vocab_parallel: int, whole_VD: torch.Tensor) -> float:
    mesh = Mesh.of(vocab_parallel, torch.device("cpu"))
    rows = torch.nn.Parameter(torch.zeros_like(whole_VD.chunk(vocab_parallel)[mesh.vocab_rank]))
    rows.grad = whole_VD.chunk(vocab_parallel)[mesh.vocab_rank].clone()
    optimizer = VocabOptimizer([rows], OptimConfig(lr=6e-4), mesh)
    return float(optimizer.grad_norm(torch.zeros((), dtype=torch.float64))[0])


def test_matrix_norm_is_exact_for_every_split():
    whole_VD = torch.randn(2**16, 64, generator=torch.Generator().manual_seed(0))
    truth = float(whole_VD.double().norm())
    for world, vocab_parallel in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4)):
        norms = run_ranks(world, matrix_norm, vocab_parallel, whole_VD)
        assert len(set(norms)) == 1
        assert norms[0] == pytest.approx(truth, rel=1e-12)


def test_sum_of_squares_matches_float64():
    """Sums 50 million squares; also in bf16, of non-contiguous tensors and of tensors smaller than a block."""
    numbers = torch.randn(50_000_000, generator=torch.Generator().manual_seed(0))
    truth = sum(float(part.double().square().sum()) for part in numbers.split(2**20))
    cpu = torch.device("cpu")
    assert float(sum_of_squares([numbers], cpu)) == pytest.approx(truth, rel=1e-12)
    parts = [numbers[:1], numbers[1:1], numbers[1:70_000], numbers[70_000:].view(-1, 10).T]
    assert float(sum_of_squares(parts, cpu)) == pytest.approx(truth, rel=1e-12)
    low = numbers[: 2**20].bfloat16()
    assert float(sum_of_squares([low], cpu)) == pytest.approx(float(low.double().square().sum()), rel=1e-12)
    assert float(sum_of_squares([], cpu)) == 0

"""The log's figures of speed and memory."""

import resource
from types import SimpleNamespace

import pytest
import torch

from pretrain.build import flops_per_token
from pretrain.hooks import StepReport
from pretrain.hooks.log import LogHook
from pretrain.peaks import peak_of
from pretrain.stops import StopReason
from tests.pretrain.tiny import VOCAB, tiny_config
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100X1", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 3090", None, None),
        ("cpu", None, None),
    ],
)
def test_the_peak_follows_from_the_name(name, bf16, fp32):
    assert (peak_of(name, 2), peak_of(name, 4), peak_of(name, 8)) == (bf16, fp32, None)


def test_flops_of_a_token_are_those_that_torch_counts(tmp_path):
    """Against torch's counter on the dense model, whose attention it counts over all positions and not over half."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(tmp_path, tmp_path, model__width=96, model__layers=3)
    body, T = config.model.body(), config.seq_len
    head_VD = torch.randn(VOCAB, 96, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden_BTD = body(torch.randn(2, T, 96, requires_grad=True), None)
        (hidden_BTD @ head_VD.T).sum().backward()
    ours, matmuls = 2 * T * flops_per_token(config, VOCAB), 0
    for name, count in counter.get_flop_counts()["Global"].items():
        matmuls += count if "attention" not in str(name) else 0
    attention = 2 * T * 6 * 3 * T * 96  # half of the positions, two matmuls
    assert ours - attention == pytest.approx(matmuls, rel=1e-6)


def logged(rank: int, world: int, stop: int = 3) -> list[dict[str, float]]:
    """Lines of steps by a hook that logs every third one, whose ranks could do 1,000 tokens/s. stop: number of steps,
    after which a signal comes.
    """
    lines: list[dict[str, float]] = []
    log = SimpleNamespace(console=SimpleNamespace(stepped=lambda *_: None), write=lambda line, rows: lines.append(line))
    trainer = SimpleNamespace(
        loop=SimpleNamespace(last_step=9),
        reason=StopReason.NONE,
        mesh=SimpleNamespace(world=world, device=torch.device("cpu")),
        state=SimpleNamespace(tokens=0),
        batches=SimpleNamespace(epochs=lambda: {}),
    )
    hook = LogHook(3, SimpleNamespace(log=log), capacity=1000.0)  # type: ignore[arg-type]
    held = torch.ones(50_000_000 if rank == world - 1 else 1)  # the last rank holds 190 MiB more
    for step, seconds in enumerate((9.0, 1.5, 0.5, 1.0, 2.0)[:stop], start=1):
        report = StepReport(step, held[0].double() / world, 1.0, 1e-3, tokens=300, seconds=seconds)
        hook.after_step(trainer, report)  # type: ignore[arg-type]
    hook.after_training(trainer)  # type: ignore[arg-type]
    return [*lines, {"own": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}]


def test_mfu_is_the_share_of_what_the_ranks_could_do():
    (_, first, own), (*_, last) = run_ranks(2, logged)
    assert first["step_s"] == 1.0 and first["tokens_per_s"] == 300.0 and first["tokens_per_s_per_rank"] == 150.0
    assert first["mfu"] == 0.3 and first["loss"] == 1.0
    assert first["peak_memory_gib"] == pytest.approx(last["own"], rel=0.05) and last["own"] > own["own"] + 0.15


def test_first_and_last_step_of_a_start_are_logged():
    (*lines, _), _ = run_ranks(2, logged, 5)
    assert [line["step"] for line in lines] == [1, 3, 5], "and no step twice"
    assert [line["step_s"] for line in lines] == [9.0, 1.0, 1.5] and lines[-1]["loss"] == 1.0

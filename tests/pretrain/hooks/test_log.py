"""The log's figures of speed and memory."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.build import flops_per_token
from pretrain.config.job import JobConfig
from pretrain.families import FAMILIES
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


# Of each family: a small body of 3 blocks; by hand the weights in the matmuls of a block, and the attention's width.
BY_HAND = {
    "gpt2": (
        {"width": 96, "heads": 3},
        96 * 3 * 96 + 96 * 96 + 96 * 384 + 384 * 96,  # qkv, output, up, down
        96,
    ),
    "llama": (
        {"width": 32, "heads": 4, "kv_heads": 2, "head_size": 12, "inner": 40, "qk_norm": True, "bias": "attention"},
        32 * (48 + 24 + 24) + 48 * 32 + 3 * 32 * 40,  # queries, keys, values; output; gate, up, down
        4 * 12,
    ),
}


def small(folder: Path, family: str, **changes: object) -> JobConfig:
    sizes = BY_HAND[family][0]
    return tiny_config(folder, folder, model={"family": family, "layers": 3, "context": 16, **sizes}, **changes)


def test_every_family_is_counted_by_hand():
    assert BY_HAND.keys() == FAMILIES.keys(), "add the new family's count"


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("family", BY_HAND)
def test_flops_of_a_token_are_those_counted_by_hand(tmp_path, family, tie, checkpointing):
    """Two FLOPs per weight in forward and four in backward. The head counts once, without padding rows, tied or not;
    the lookup and what checkpointing repeats count nothing.
    """
    sizes, weights, attention = BY_HAND[family]
    changes = {"vocab__tie": tie, "engine__activation_checkpointing": checkpointing}
    config = small(tmp_path, family, **changes)
    assert VOCAB % config.vocab.multiple, "there must be padding rows"
    of_attention = 2 * (16 / 2) * attention  # scores and values of the 16 / 2 positions that a token sees on average
    assert flops_per_token(config, VOCAB) == 6 * (3 * (weights + of_attention) + VOCAB * sizes["width"])


@pytest.mark.parametrize("family", BY_HAND)
def test_flops_of_a_token_are_those_that_torch_counts(tmp_path, family):
    """Against torch's counter on the dense model, without the attention, which it counts over all positions."""
    from torch.utils.flop_counter import FlopCounterMode

    config, (sizes, _, attention) = small(tmp_path, family), BY_HAND[family]
    body, T, D = config.model.body(), config.seq_len, sizes["width"]
    head_VD = torch.randn(VOCAB, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden_BTD = body(torch.randn(2, T, D, requires_grad=True), None)
        (hidden_BTD @ head_VD.T).sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    matmuls = sum(count for name, count in counts if "attention" not in str(name))
    assert 2 * T * (flops_per_token(config, VOCAB) - 6 * 3 * T * attention) == pytest.approx(matmuls, rel=1e-6)


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
        report = StepReport(step, float(held[0]), 1.0, 1e-3, tokens=300, seconds=seconds)
        trainer.state.step = step
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

"""The Llama family matches plain formulas, published sizes and, under every engine, the dense run.

Equality with `transformers` is tested with the import, in tests/pretrain/interop.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from launch.rehearsal import rehearse
from launch.step import total
from pretrain.compose import build_config, register_groups
from pretrain.families.llama import LlamaConfig
from pretrain.models.llama import Attention, Body, RMSNorm, frequencies
from tests.benchmarks.plan import configured, step_of
from tests.launch.simulate import simulate
from tests.launch.test_plan import GPU, told
from tests.pretrain.dense import dense_training
from tests.pretrain.engine.test_engines import BF16, ENGINES, STEPS, apart, assert_same, outcome, train_ranks
from tests.pretrain.models.test_gpt2 import CONF, packed
from tests.pretrain.tiny import tiny_config, write_tokens
from tests.ranks import run_ranks

SMALL = LlamaConfig(
    layers=2,
    width=12,
    heads=4,
    kv_heads=2,
    head_size=6,
    inner=20,
    context=8,
    rope_theta=100.0,
    qk_norm=True,
    bias="qkv",
)
TINY = {
    "family": "llama",
    "layers": 2,
    "width": 20,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 6,
    "inner": 36,
    "context": 16,
}


def initialised(config: LlamaConfig, seed: int = 0) -> Body:
    body = config.body()
    for name, parameter in body.named_parameters():
        parameter.data = body.initial_rows(name, seed, 0, len(parameter)).double()
    return body


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_gradients_are_causal():
    body = initialised(SMALL)
    jacobian = torch.autograd.functional.jacobian(body, random(1, 7, SMALL.width))  # [1, T, D, 1, T, D]
    influence = jacobian.abs().amax((0, 2, 3, 5))  # of position s (column) on position t (row)
    assert torch.equal(influence != 0, torch.ones(7, 7).tril().bool())


def test_packed_documents_match_separate_documents():
    body, hidden = initialised(SMALL), random(2, 7, SMALL.width)
    starts_BT, documents = packed()
    together = body(hidden, starts_BT)
    for document in documents:
        torch.testing.assert_close(together[:1, document], body(hidden[:1, document]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[1:], body(hidden[1:]), rtol=1e-12, atol=1e-12)


def test_attention_matches_complex_rotation_per_head():
    """The reference rotates complex numbers, head by head. It shares no code with the body."""
    body = initialised(SMALL)
    attention, hidden = body.blocks[0].attention, random(1, 5, SMALL.width)
    assert isinstance(attention, Attention)
    d, K, angles = SMALL.size, SMALL.kv_heads, frequencies(SMALL, torch.device("cpu")).double()
    turns = torch.polar(torch.ones(5, d // 2, dtype=torch.float64), torch.arange(5)[:, None] * angles)

    def turned(x_TDd: torch.Tensor) -> torch.Tensor:
        x = x_TDd / (x_TDd.square().mean(-1, keepdim=True) + SMALL.eps).sqrt()
        return torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turns[:, None]

    parts = attention.qkv(hidden)[0].unflatten(-1, (-1, d)).split([SMALL.heads, K, K], dim=1)
    queries, keys, values = turned(parts[0]), turned(parts[1]), parts[2]
    mixed = torch.zeros(5, SMALL.heads, d, dtype=torch.float64)
    for t, head in itertools.product(range(5), range(SMALL.heads)):
        group = head // (SMALL.heads // K)
        scores = (queries[t, head] * keys[: t + 1, group].conj()).sum(-1).real / math.sqrt(d)
        mixed[t, head] = scores.softmax(0) @ values[: t + 1, group]
    out = attention(hidden, body.tables(hidden, None))
    torch.testing.assert_close(out[0], attention.out(mixed.flatten(1)), rtol=1e-6, atol=1e-9)  # cosines are in fp32


def test_norm_keeps_input_dtype():
    norm, x = RMSNorm(6, 1e-5), random(3, 6)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm.double()(x), exact)
    assert norm.float()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name,matrices,rows,parameters",
    [
        ("llama_1b", 1, 128_256, 1_235_814_400),
        ("llama_8b", 2, 128_256, 8_030_261_248),
        ("qwen3_600m", 1, 151_936, 596_049_920),
    ],
)
def test_parameter_counts_match_published(name, matrices, rows, parameters):
    register_groups()
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("train", [f"model={name}", "data.path=data", "run.dir=run"])
    model = build_config(composed).model
    with torch.device("meta"):
        body = model.body()
    assert sum(p.numel() for p in body.parameters()) + matrices * rows * model.width == parameters


def test_initial_values_match_their_kind():
    config = LlamaConfig(layers=4, width=256, heads=4, kv_heads=2, inner=704, qk_norm=True, bias="attention")
    for name, parameter in (body := initialised(config)).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(8) if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            assert abs(parameter.std() / std - 1) < 0.02 and abs(parameter.mean()) < 0.02 * std, name
    for name, parameter in body.named_parameters():
        n = len(parameter)
        pieces = [body.initial_rows(name, 0, *cut) for cut in itertools.pairwise([0, 1, n // 3, n - 1, n])]
        assert torch.equal(torch.cat(pieces).double(), parameter), name


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"inner": 0}, "model.inner=0 must be at least 1"),
        ({"kv_heads": 3}, "model.kv_heads=3 must divide model.heads=32"),
        ({"width": 100}, "model.heads=32 must divide model.width=100, or give model.head_size"),
        ({"head_size": 7}, "model.head_size=7 must be even"),
        ({"eps": 0.0}, "model.eps=0.0 must be positive"),
        ({"rope_low": 4.0}, "model.rope_low=4.0 must be below model.rope_high=4.0"),
        ({"bias": "all"}, "model.bias=all must be none, qkv or attention"),
    ],
)
def test_invalid_setting_raises(setting, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**setting)


KINDS = {
    "plain": {},
    "qwen3": {"qk_norm": True},
    "qwen2, untied": {"bias": "qkv", "rope_factor": 4.0, "rope_original": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_tokens(folder / "tokens")
    return folder


def config_of(folder, name, engine="fsdp2", kind="plain", **changes):
    settings = {
        "engine": ENGINES[engine],
        "model": TINY | KINDS[kind],
        "vocab__tie": "untied" if "untied" in kind else "tied",
        "train__steps": STEPS,
        "train__global_batch": 24,
        "train__micro_batch": 6,
        "optim__eps": 1e-5,
    }
    return tiny_config(folder / "tokens", folder / name, **settings | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_match_dense_under_each_engine(folder, kind):
    masked = {"data__documents": "masked"} if kind == "qwen3" else {}
    dense = dense_training(config_of(folder, "dense", kind=kind, **masked))
    engines = ENGINES if kind == "plain" else ("fsdp2", "zero1", "zero3")
    configs = [config_of(folder, f"{kind}-{engine}", engine, kind, **masked) for engine in engines]
    run_ranks(2, train_ranks, configs, timeout=180)
    for config in configs:
        run = outcome(config.run_dir)
        np.testing.assert_allclose(run.losses, dense.losses, rtol=1e-5)
        np.testing.assert_allclose(run.norms, dense.norms, rtol=1e-5)
        for name, weight in dense.weights.items():
            assert apart(run.tensors[name], weight) <= 1e-5, name


@pytest.mark.parametrize(
    "change",
    [
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "block"},
        {"compile": True, "activation_checkpointing": "selective"},
    ],
    ids=["selective", "block", "compile"],
)
def test_memory_and_time_savings_keep_results(folder, change):
    name, straight = "-".join(map(str, change.values())), config_of(folder, "straight", kind="qwen3")
    config = config_of(folder, name, kind="qwen3", **{f"engine__{key}": value for key, value in change.items()})
    if not straight.run_dir.exists():
        run_ranks(2, train_ranks, [straight])
    run_ranks(1 if config.engine.compile else 2, train_ranks, [config], timeout=300)  # each rank would compile
    assert_same(outcome(config.run_dir), outcome(straight.run_dir), 1e-5)


@pytest.mark.parametrize("engine", ENGINES if BF16 else ("fsdp2",))
def test_bf16_training_is_close_to_fp32(folder, engine):
    """Runs if the processor supports bf16; compares with fp32 to 0.1 %."""
    fp32 = config_of(folder, f"{engine}-fp32", engine)
    low = config_of(folder, f"{engine}-auto", engine, train__precision="auto")
    run_ranks(2, train_ranks, [fp32, low], timeout=180)
    np.testing.assert_allclose(outcome(low.run_dir).losses, outcome(fp32.run_dir).losses, rtol=1e-3)


SETTINGS = ["train.micro_batch=1", "train.seq_len=64", "train.global_batch=64"]


@pytest.mark.parametrize("model", ["llama_1b", "llama_8b", "qwen3_600m"])
def test_step_is_rehearsed(model):
    rehearse(configured(f"model={model}", *SETTINGS, "data.documents=masked", "vocab.tie=untied"), 1000, 8, 64)


@pytest.mark.parametrize("kind", ["none", "block", "selective"])
def test_step_traffic_and_memory_match_plan(kind):
    """The plan is for GPUs, where a norm keeps only its input. On a CPU it also keeps its normalised values."""
    sizes = ["train.micro_batch=8", "train.seq_len=1024", "train.global_batch=128", "train.precision=fp32"]
    checkpointing = f"engine.activation_checkpointing={kind}"
    config = configured("model=llama_1b", "model.layers=2", *sizes, checkpointing)
    step, seen = step_of(config, 50_257, 8, 16, GPU), simulate(config, 50_257, 8, 16, GPU)
    assert told(step, seen.lookup) == (seen.calls, seen.given)
    blocks = {"none": config.model.layers, "block": 1, "selective": 0}[kind]  # blocks with norms in memory at the peak
    normed = blocks * 2 * config.model.width * step.work.tokens * 4
    assert max(map(total, step.phases().values())) + normed == pytest.approx(seen.held, rel=0.05)

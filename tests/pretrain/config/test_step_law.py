"""Learning rate, batch size and warm-up that follow from the model and the length of the run."""

import re
import shlex
from pathlib import Path

import pytest

from data_prep.command import compose_settings
from pretrain.compose import build_config, register_groups
from pretrain.config.job import JobConfig
from pretrain.config.step_law import batch_for_steps, batch_for_tokens, learning_rate
from pretrain.families import FAMILIES

GPT2 = 85_056_000 + 1024 * 768  # blocks, final norm and positions of GPT-2, counted by hand
MILLION = 10**6


def composed(settings: str) -> JobConfig:
    register_groups()
    return build_config(compose_settings("train", ["run.dir=run", "data.path=data", *shlex.split(settings)]))


def test_values_of_the_paper():
    """1.07B parameters on 100B tokens, worked out by hand: 1.79 · 3.65e-7 · 2382 = 1.56e-3; 0.58 · 1.913e6 tokens."""
    assert learning_rate(1_070 * MILLION, 100_000 * MILLION) == 1.6e-3
    assert batch_for_tokens(100_000 * MILLION, 2048) == 512  # 1.11M tokens = 542 sequences


@pytest.mark.parametrize("parameters,tokens", [(10 * MILLION, 10 * MILLION), (1000, 10**12)])
def test_learning_rate_of_a_small_model_is_bounded(parameters, tokens):
    assert learning_rate(parameters, tokens) == 2e-3


@pytest.mark.parametrize("steps", [100, 5000, 20_000, 100_000, 2_000_000])
def test_batch_for_steps_is_the_batch_for_their_tokens(steps):
    """Rounding to a power of two changes the tokens of the run by at most √2, and thus the batch by 2^0.29."""
    size = batch_for_steps(steps, 512)
    assert size & (size - 1) == 0 and size >= 32
    exact = 0.58 * (steps * size * 512) ** 0.571 / 512
    assert size == 32 or 2**-0.79 < size / exact < 2**0.79


@pytest.mark.parametrize(
    "settings,expected",
    [
        ("model=gpt2 train.steps=1000", (32, 8.0e-4, 100)),
        ("model=gpt2 'train.steps=2.5B tokens'", (128, 2e-3, 1907)),
        ("model=llama_8b train.steps=50_000 train.global_batch=512", (512, 5.1e-4, 2000)),
        ("model=gpt2 train.steps=1000 optim.lr=6e-4 optim.warmup_steps=7 train.global_batch=8", (8, 6e-4, 7)),
        ("model=gpt2 train.steps=1000 'train.batch_schedule={0:8}'", (8, 5.2e-4, 100)),
    ],
)
def test_what_is_not_given_follows_from_model_and_length(settings, expected):
    config = composed(settings)
    assert (config.train.global_batch, config.optim.lr, config.optim.warmup_steps) == expected


def test_table_of_the_documentation():
    text = (Path(__file__).resolve().parents[3] / "docs/training.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,BM]+) (steps|tokens) \| ([\d,]+) × ([\d,]+) \| (\S+) \| ([\d,]+) \|$", text, re.MULTILINE
    )
    assert len(rows) == 12
    for model, *numbers in rows:
        number, unit, batch, length, lr, warmup = (word.replace(",", "") for word in numbers)
        config = composed(f"model={model} train.seq_len={length} 'train.steps={number} {unit}'")
        found = (config.train.global_batch, f"{config.optim.lr:.1e}", config.optim.warmup_steps)
        assert found == (int(batch), lr, int(warmup)), (model, number, unit)


def test_parameters_are_those_of_the_body():
    config = composed("model=gpt2")
    assert FAMILIES["gpt2"].parameters(config.model) == GPT2
    assert sum(parameter.numel() for parameter in config.model.body().parameters()) == GPT2

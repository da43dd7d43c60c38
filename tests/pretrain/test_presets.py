"""Presets in conf/model/*.yaml match the published models."""

from pathlib import Path

import pytest

from pretrain.announce import counts, parameters
from tests.benchmarks.plan import CONF, configured

# rows of the vocabulary, number of matrices, and all parameters of the published checkpoint
PUBLISHED = {
    "gpt2": (50_257, 1, 124_439_808),
    "gpt2_medium": (50_257, 1, 354_823_168),
    "gpt2_large": (50_257, 1, 774_030_080),
    "gpt2_xl": (50_257, 1, 1_557_611_200),
    "llama_1b": (128_256, 1, 1_235_814_400),
    "llama_3b": (128_256, 1, 3_212_749_824),
    "llama_8b": (128_256, 2, 8_030_261_248),
    "qwen3_600m": (151_936, 1, 596_049_920),
}
OURS = ("nano", "llama_tiny")  # unpublished; not a set, because its order would differ between test processes


def test_every_preset_has_published_count():
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} == {*PUBLISHED, *OURS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_matches_published(name):
    rows, matrices, published = PUBLISHED[name]
    config = configured(f"model={name}")
    body, matrix = counts(config, rows)
    assert config.vocab.matrices == matrices
    assert body + matrix * config.vocab.matrices == published
    assert parameters(config, body, matrix, rows).startswith(f"{published / 1e6:.1f}M parameters")


@pytest.mark.parametrize("name", [*PUBLISHED, *OURS])
def test_default_sequence_length_is_limited(name):
    config = configured(f"model={name}")
    assert config.seq_len == min(config.model.context, 8192)


def test_sequence_length_of_the_command_line_wins():
    assert configured("model=llama_1b", "train.seq_len=131072").seq_len == 131_072
    assert configured("model=llama_1b", "model.context=4096").seq_len == 4096


def test_tie_of_the_command_line_wins():
    assert configured("model=llama_8b", "vocab.tie=tied").vocab.tie == "tied"
    assert configured("model=gpt2", "vocab.tie=untied").vocab.tie == "untied"


@pytest.mark.parametrize("base,tie", [("family/llama", "tied"), ("llama_8b", "untied")])
def test_user_model_inherits_tie(tmp_path: Path, base, tie):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text(f"defaults: [{base}@_here_, _self_]\nlayers: 3\ncontext: 131072\n")
    config = configured(f"hydra.searchpath=[file://{tmp_path}]", "model=own")
    assert config.vocab.tie == tie and config.model.layers == 3 and config.seq_len == 8192

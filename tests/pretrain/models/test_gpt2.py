"""GPT-2's body is causal and has the published sizes and initial values."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from pretrain.compose import build_config, register_groups
from pretrain.families.gpt2 import GPT2Config
from pretrain.models.attention import attention, block_mask, within_documents
from pretrain.models.gpt2 import Attention, Body

SMALL = GPT2Config(layers=2, width=12, heads=3, context=8)
CONF = Path(__file__).parents[3] / "conf"


def initialised(config: GPT2Config, seed: int = 0) -> Body:
    body = config.body()
    for name, parameter in body.named_parameters():
        parameter.data = body.initial_rows(name, seed, 0, len(parameter)).double()
    return body


def test_gradients_are_causal():
    body = initialised(SMALL)
    hidden = torch.randn(1, 7, SMALL.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(body, hidden)  # [1, T, D, 1, T, D]
    influence = jacobian.abs().amax((0, 2, 3, 5))  # of position s (column) on position t (row)
    assert torch.equal(influence != 0, torch.ones(7, 7).tril().bool())


def test_attention_matches_explicit_softmax():
    attention = Attention(SMALL).double()
    hidden = torch.randn(2, 5, SMALL.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = attention(hidden)
    size = SMALL.width // SMALL.heads
    queries, keys, values = attention.qkv(hidden).split(SMALL.width, dim=-1)
    for t in range(5):
        mixed = torch.empty(2, SMALL.width, dtype=torch.float64)
        for head in range(SMALL.heads):
            part = slice(head * size, (head + 1) * size)
            scores = (keys[:, : t + 1, part] @ queries[:, t, part].unsqueeze(-1)).squeeze(-1) / math.sqrt(size)
            mixed[:, part] = (scores.softmax(-1).unsqueeze(-1) * values[:, : t + 1, part]).sum(1)
        torch.testing.assert_close(out[:, t], attention.out(mixed))


def packed() -> tuple[torch.Tensor, list[list[int]]]:
    """Returns the start of each position's document, and the positions of each document."""
    starts_BT = torch.tensor([[0, 0, 2, 2, 2, 5, 6], [0, 0, 0, 0, 0, 0, 0]])
    return starts_BT, [[0, 1], [2, 3, 4], [5], [6]]


def test_packed_documents_match_separate_documents():
    body = initialised(SMALL)
    starts_BT, documents = packed()
    hidden = torch.randn(2, 7, SMALL.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = body(hidden, starts_BT)
    for document in documents:
        torch.testing.assert_close(together[:1, document], body(hidden[:1, document]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[1:], body(hidden[1:]), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_mask_matches_boolean_mask():
    """Runs FlexAttention uncompiled on the CPU."""
    starts_BT, _ = packed()
    exact = within_documents(starts_BT)
    blocks = block_mask(starts_BT)
    queries, keys, values = torch.randn(3, 2, 3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, truth = attention(queries, keys, values, blocks), attention(queries, keys, values, exact)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name,parameters",
    [
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
    ],
)
def test_parameter_counts_match_published(name, parameters):
    register_groups()
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("train", [f"model={name}", "data.path=data", "run.dir=run"])
    model = build_config(composed).model
    with torch.device("meta"):
        body = model.body()
    assert sum(p.numel() for p in body.parameters()) + 50_257 * model.width == parameters


def test_initial_values_match_their_kind():
    config = GPT2Config(layers=4, width=256, heads=4, context=256)
    residual = 0.02 / math.sqrt(2 * config.layers)
    body = initialised(config)
    for name, parameter in body.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            out = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.01 if name == "positions" else residual if out else 0.02
            assert abs(parameter.std() / std - 1) < 0.02 and abs(parameter.mean()) < 0.02 * std, name
    first, second = (body.get_parameter(f"blocks.{i}.mlp.up.weight") for i in (0, 1))
    assert not torch.equal(first, second)


def test_initial_rows_do_not_depend_on_sharding():
    with torch.device("meta"):
        body = GPT2Config(layers=1, width=96, heads=3, context=130).body()
    for name, parameter in body.named_parameters():
        n = len(parameter)
        whole = body.initial_rows(name, 3, 0, n)
        assert whole.shape == parameter.shape
        for cuts in ([0, n // 3, n], [0, 1, n - 1, n - 1, n]):
            pieces = [body.initial_rows(name, 3, *cut) for cut in itertools.pairwise(cuts)]
            assert torch.equal(torch.cat(pieces), whole), name


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"layers": 0}, "model.layers=0 must be at least 1"),
        ({"width": 0}, "model.width=0 must be at least 1"),
        ({"heads": 0}, "model.heads=0 must be at least 1"),
        ({"context": 0}, "model.context=0 must be at least 1"),
        ({"heads": 6, "width": 256}, "model.heads=6 must divide model.width=256"),
    ],
)
def test_invalid_setting_raises(setting, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**setting)

"""Initial values and steps follow the width by muP with optim.base_width; the model stays an ordinary one."""

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.resume import check_resumable
from pretrain.commands.hf import export_model
from pretrain.config.job import JobConfig
from pretrain.config.optim import OPTIMIZERS
from pretrain.data import open_data
from pretrain.engine.footprint import hidden_matrices
from pretrain.families.llama import LlamaConfig
from pretrain.generation import load_model
from pretrain.optim import body_factors
from tests.pretrain.engine.test_engines import outcome, train_ranks
from tests.pretrain.interop import models
from tests.pretrain.tiny import VOCAB, tiny_config, write_tokens
from tests.ranks import run_ranks

CASES = {"off": None, "same": 24, "quarter": 6}  # optim.base_width of a model of width 24


@pytest.mark.parametrize("name,rate", [("adamw", 1 / 4), ("muon", 1 / 2)])
def test_factors_match_table(name, rate):
    """Four times the base width: initial value, rate, eps, weight decay."""
    with torch.device("meta"):
        body = LlamaConfig(layers=1, width=32, heads=4, kv_heads=2, inner=64, qk_norm=True, bias="attention").body()
    optim = OPTIMIZERS[name](lr=1e-2, base_width=8)
    found = body_factors(optim, body, hidden_matrices(body), name == "muon")
    hidden, other = (1 / 2, rate, 1 / 4, 1 / rate), (1, 1, 1 / 4, 1)
    assert found == {
        "blocks.0.norm1.weight": other,
        "blocks.0.attention.qkv.weight": hidden,
        "blocks.0.attention.qkv.bias": other,
        "blocks.0.attention.out.weight": hidden,
        "blocks.0.attention.out.bias": other,
        "blocks.0.attention.query_norm.weight": other,
        "blocks.0.attention.key_norm.weight": other,
        "blocks.0.norm2.weight": other,
        "blocks.0.mlp.gate.weight": hidden,
        "blocks.0.mlp.up.weight": hidden,
        "blocks.0.mlp.down.weight": hidden,
        "norm.weight": (1 / 4, 1 / 4, 1, 1),
    }


def config_of(folder: Path, name: str, **changes: object) -> JobConfig:
    settings = {"train__steps": 3, "optim__base_width": CASES[name]}
    return tiny_config(folder / "tokens", folder / name, **settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder with a run of each case."""
    folder = tmp_path_factory.mktemp("width")
    write_tokens(folder / "tokens")
    run_ranks(1, train_ranks, [config_of(folder, name) for name in CASES])
    return folder


def test_base_width_of_the_model_changes_no_bit(folder):
    off, same, quarter = (outcome(folder / name) for name in CASES)
    assert (off.losses, off.norms) == (same.losses, same.norms) and off.losses != quarter.losses
    assert off.tensors.keys() == same.tensors.keys() == quarter.tensors.keys()
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in off.tensors.items())


def test_export_has_the_same_logits(folder, tmp_path):
    """transformers needs no factor for the logits."""
    run, tokens = folder / "quarter", torch.arange(32).reshape(2, 16)
    list(export_model([f"run={run}", f"out={tmp_path / 'out'}"]))
    model, _ = load_model(checkpoints(run)[-1], torch.device("cpu"))
    with torch.no_grad():
        ours = model.body(model.vocab.lookup(tokens)) @ model.vocab.output_weight[:VOCAB].T
    torch.testing.assert_close(models.logits(tmp_path / "out", tokens, torch.float32), ours, rtol=1e-5, atol=1e-5)


def test_resume_keeps_base_width(folder):
    for name, others in (("off", "quarter"), ("quarter", "off")):
        config, manifest = config_of(folder, name), read_manifest(checkpoints(folder / name)[-1])
        check_resumable(config, open_data(config.data), VOCAB, manifest)
        config.optim.base_width = CASES[others]
        with pytest.raises(ValueError, match=f"holds a run with optim.base_width={CASES[name]}, this command has"):
            check_resumable(config, open_data(config.data), VOCAB, manifest)


def test_checkpoints_without_the_setting_have_none(folder):
    config, manifest = config_of(folder, "off"), read_manifest(checkpoints(folder / "off")[-1])
    del manifest["config"]["optim"]["base_width"]
    check_resumable(config, open_data(config.data), VOCAB, manifest)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"optim__base_width": 0}, r"optim.base_width=0 must be at least 1 \(or null: off\)"),
        ({"optim__base_width": 6, "optim__lr": None}, "optim.base_width=6 must have optim.lr, the rate at that width"),
    ],
)
def test_bad_settings_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path / "tokens", tmp_path / "run", **changes)

"""A model family defined only in this file works after one entry in the registry.

It is composed, planned, trained, exported and imported.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from torch import Tensor, nn

from launch.rehearsal import rehearse
from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.rows import CheckpointRows
from pretrain.commands.hf import export_model, import_model
from pretrain.compose import load_config
from pretrain.config.job import JobConfig
from pretrain.families import FAMILIES, Activations, Family, HuggingFace, WeightMapping
from pretrain.families.family import need
from pretrain.interop.folder import HFModel
from pretrain.models.initial import initial_rows
from pretrain.vocab.kernels.torch import TorchKernels
from tests.benchmarks.plan import configured, step_of
from tests.pretrain.tiny import VOCAB, train_rank, write_tokens
from tests.ranks import run_ranks

CAP = 30.0


@dataclass
class ToyConfig:
    family: str = "toy"
    layers: int = 2
    width: int = 16
    context: int = 16

    def body(self) -> nn.Module:
        return Body(self)

    def activations(self, checkpointing: str) -> Activations:
        kept = 1 if checkpointing == "block" else 3
        return Activations(kept * self.width, (3 - kept) * self.width, self.width, 0, 0, f"N · D · {kept}")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD + F.gelu(self.mix(hidden_BTD))


class Body(nn.Module):
    """Body without attention: each token sees only itself."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.layers = config.layers
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(self, hidden_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return self.norm(hidden_BTD)

    def initial_rows(self, name: str, seed: int, start: int, stop: int) -> Tensor:
        return initial_rows(self.get_parameter(name).shape, name, seed, start, stop, self.layers)


def model(config: dict[str, Any]) -> ToyConfig:
    layers, width, context = need(config, "depth", "size", "positions")
    return ToyConfig(layers=layers, width=width, context=context)


def settings(model: ToyConfig) -> dict[str, Any]:
    return {"model_type": "toy", "depth": model.layers, "size": model.width, "positions": model.context}


def mappings(model: ToyConfig) -> list[WeightMapping]:
    mixes = [
        WeightMapping(f"blocks.{i}.mix.weight", {f"h.{i}.weight": model.width}, model.width, transposed=True)
        for i in range(model.layers)
    ]
    return [*mixes, WeightMapping("norm.weight", {"last.weight": model.width})]


TOY = Family(
    ToyConfig,
    HuggingFace({"toy": "Toy"}, "toy.", "tokens.weight", True, (), model, settings, mappings),
    vocab={"softcap": CAP},
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, TOY.name, TOY)
    yield
    repo = ConfigStore.instance().repo
    for group, kind in (("model", "family"), ("model", "settings"), ("vocab", "family")):
        repo[group].get(kind, {}).pop(f"{TOY.name}.yaml", None)


def toy(*overrides: str) -> JobConfig:
    return configured("model=family/toy", f"vocab.size={VOCAB}", *overrides)


def test_model_sets_vocab_settings_of_its_family():
    config = toy("model.layers=3")
    assert config.model == ToyConfig(layers=3) and config.vocab.softcap == CAP
    assert toy("vocab.softcap=5.0").vocab.softcap == 5
    assert configured("model=gpt2").vocab.softcap is None


def test_untied_preset_keeps_family_settings(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "big.yaml").write_text(
        "defaults: [family/toy@_here_, /vocab/tie/untied@_global_.vocab, _self_]\nlayers: 3\n"
    )
    config = configured(f"hydra.searchpath=[file://{tmp_path}]", "model=big", f"vocab.size={VOCAB}")
    assert (config.vocab.tie, config.vocab.softcap, config.model.layers) == ("untied", CAP, 3)


def test_new_family_is_planned_and_rehearsed():
    config = toy("train.micro_batch=2", "train.global_batch=8")
    rehearse(config, VOCAB, parallel=2, world=2)
    step = step_of(config, VOCAB, 2, 2, TorchKernels(slab_bytes=2**20, memory_mib=1))
    bytes_of = {item.name: item.bytes for item in step.phases()["a block's backward"]}
    tokens = 2 * config.model.context
    assert bytes_of["activations"] == tokens * step.work.itemsize * (2 * 3 + 1) * config.model.width


def train_toy(rank: int, world: int, config: JobConfig) -> None:
    FAMILIES[TOY.name] = TOY  # a rank is a separate process
    train_rank(rank, world, config)


def test_new_family_survives_export_and_import(tmp_path):
    run, out, again = tmp_path / "run", tmp_path / "out", tmp_path / "again"
    config = toy(
        f"data.path={write_tokens(tmp_path / 'tokens')}",
        f"run.dir={run}",
        "train.steps=2",
        "train.global_batch=4",
        "train.micro_batch=2",
        "train.precision=fp32",
        "optim.warmup_steps=1",
        "log.tensorboard=false",
    )
    run_ranks(2, train_toy, config)
    trained = CheckpointRows(checkpoints(run)[-1])
    assert trained.manifest["step"] == 2
    list(export_model([f"run={run}", f"out={out}"]))
    found = HFModel(out)
    assert found.model == config.model and found.tie == "tied"
    for name, mapping in found.mappings.items():
        rows = sum(mapping.theirs.values())
        assert torch.equal(found.rows(name, 0, rows), trained.rows(name, 0, rows))
    list(import_model([f"hf={out}", f"run={again}"]))
    assert load_config(again / "config.yaml").vocab.softcap == CAP

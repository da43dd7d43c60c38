"""Overrides in optim.body and optim.vocab match a dense AdamW with parameter groups."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from pretrain.changes import settings_changed
from pretrain.compose import build_config, config_text
from pretrain.config.job import JobConfig
from pretrain.config.optim import OptimConfig, OwnerConfig
from pretrain.optim import lr_at
from tests.pretrain.dense import Dense, DenseModel, scale_to_width, windows_of
from tests.pretrain.engine.test_engines import apart, config_of, outcome
from tests.pretrain.tiny import tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

STEPS = 6
BODY = {"lr": 2e-2, "beta1": 0.7, "beta2": 0.9, "weight_decay": 0.3}
VOCAB = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-4, "weight_decay": 0.5, "weight_decay_schedule": "lr"}
SETTINGS = {"both": (BODY, VOCAB), "body": (BODY, {}), "vocab": ({}, VOCAB), "neither": ({}, {})}
CASES = [("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("zero0", 1), ("zero1", 2), ("zero2", 3), ("zero3", 4)]


def owners_config(run: Path, given: str, engine: str = "fsdp2", world: int = 1) -> JobConfig:
    body, vocab = SETTINGS[given]
    changes = {"vocab__tie": "untied", "vocab__parallel": 2 if world % 2 == 0 else world, "train__steps": STEPS}
    if given == "both":
        changes |= {"optim__base_width": 7, "optim__clip": 0.1}  # a third of the width
    return config_of(run, world, engine=engine, **changes, optim__body=body, optim__vocab=vocab)


def dense_training(config: JobConfig) -> Dense:
    """Trains in float64 with groups. Each uses the settings above, otherwise the common ones, and follows the width."""
    model, m = DenseModel(config, torch.float64), config.model.width / (config.optim.base_width or config.model.width)
    scale_to_width(model.body, m)
    common = asdict(config.optim)
    body = common | {key: value for key, value in common["body"].items() if value is not None}
    vocab = common | {key: value for key, value in common["vocab"].items() if value is not None}
    weights = dict(model.body.named_parameters())
    matrices = {"embedding.weight": model.weight, "head.weight": model.head_weight}
    hidden = {"lr": body["lr"] / m, "weight_decay": body["weight_decay"] * m, "eps": body["eps"] / m}
    vectors = [name for name, weight in weights.items() if weight.dim() == 1]
    last = [name for name in vectors if name.startswith("norm.")]
    groups = [
        ([weight for name, weight in weights.items() if "blocks" in name and weight.dim() == 2], body | hidden),
        ([weights["positions"]], body | {"eps": body["eps"] / m}),
        ([weights[name] for name in vectors if name not in last], body | {"eps": body["eps"] / m, "weight_decay": 0.0}),
        ([weights[name] for name in last], body | {"lr": body["lr"] / m, "weight_decay": 0.0}),
        ([*matrices.values()], vocab | {"eps": vocab["eps"] / m}),
    ]
    adamw = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "betas": (own["beta1"], own["beta2"]),
                **{key: own[key] for key in ("lr", "eps", "weight_decay")},
            }
            for parameters, own in groups
        ]
    )
    losses, norms = [], []
    for step in range(STEPS):
        loss = model.loss(*windows_of(config, step))
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)))
        for group, (_, own) in zip(adamw.param_groups, groups, strict=True):
            share = lr_at(config.optim, step, STEPS) / config.optim.lr
            group["lr"] = own["lr"] * share
            if own["weight_decay_schedule"] == "lr":
                group["weight_decay"] = own["weight_decay"] * share
        adamw.step()
        adamw.zero_grad()
    return Dense(losses, norms, {name: p.detach() for name, p in (weights | matrices).items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("owners")
    write_tokens(folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def truth(folder):
    return cache(lambda given: dense_training(owners_config(folder / "dense", given)))


@pytest.mark.parametrize("engine,world", CASES)
def test_owners_match_dense_adamw_with_groups(folder, truth, engine, world):
    run = folder / f"{engine}-{world}"
    run_ranks(world, train_rank, owners_config(run, "both", engine, world))
    found, dense = outcome(run), truth("both")
    assert min(dense.norms) > 0.1, "the clip must be active"
    np.testing.assert_allclose(found.losses, dense.losses, rtol=1e-5)
    np.testing.assert_allclose(found.norms, dense.norms, rtol=1e-4)
    for name, weight in dense.weights.items():
        assert apart(found.tensors[name], weight) < 1e-4, name
    rates = [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(rates) == pytest.approx(1e-2), "the common learning rate is logged"


@pytest.mark.parametrize("given", ["body", "vocab"])
def test_overrides_of_one_owner_keep_the_other(folder, truth, given):
    run = folder / f"{given} alone"
    run_ranks(2, train_rank, owners_config(run, given, "fsdp2", 2))
    for name, weight in truth(given).weights.items():
        assert apart(outcome(run).tensors[name], weight) < 1e-4, name
    other = truth("vocab" if given == "body" else "body").weights
    assert min(apart(other[name], weight) for name, weight in truth(given).weights.items() if weight.dim() == 2) > 1e-2


def test_owner_defaults_to_common_settings():
    optim = OptimConfig(lr=0.3, beta1=0.5, vocab=OwnerConfig(beta1=0.6))
    assert optim.hyperparameters(optim.body) == (1.0, None, 0.5, 0.95, 1e-8, 0.1)
    assert optim.hyperparameters(optim.vocab) == (1.0, None, 0.6, 0.95, 1e-8, 0.1)


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"optim__vocab__lr": -1}, r"optim.vocab.lr=-1.0 must be positive"),
        ({"optim__body__eps": 0}, r"optim.body.eps=0.0 must be positive"),
        ({"optim__vocab__beta2": 1}, r"optim.vocab.beta2=1.0 must be in \[0, 1\)"),
        ({"optim__body__weight_decay": -0.1}, r"optim.body.weight_decay=-0.1 must be a number of at least 0"),
        ({"optim__vocab__lr": "fast"}, r"optim.vocab.lr=fast must be a number"),
        ({"optim__vocab__clip": 1}, r"unknown key optim.vocab.clip"),
        ({"optim__name": "sgd"}, r"optim.name=sgd must be one of adamw, muon"),
    ],
)
def test_invalid_setting_raises(tmp_path, setting, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        tiny_config(tmp_path / "tokens", tmp_path / "run", **setting)


def test_config_without_owners_resumes_unchanged(tmp_path):
    config = tiny_config(tmp_path / "tokens", tmp_path)
    old = asdict(config)
    for key in ("name", "body", "vocab"):
        del old["optim"][key]
    assert build_config(OmegaConf.create(old)) == config
    (tmp_path / "config.yaml").write_text(config_text(config))
    (tmp_path / "manifest.json").write_text(json.dumps({"config": old}))
    assert settings_changed(tmp_path, tmp_path) == []

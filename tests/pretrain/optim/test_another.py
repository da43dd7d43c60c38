"""Engines, checkpoints and the planner support an optimizer with other states than AdamW's."""

import torch

from pretrain.build import body_footprint, vocab_workload
from pretrain.optim import Optimizer
from pretrain.optim.build import OF_BODY
from pretrain.optim.width import NONE
from tests.pretrain.engine.test_engines import apart, config_of, outcome
from tests.pretrain.tiny import VOCAB, train_rank, write_tokens
from tests.ranks import run_ranks


class Momentum(Optimizer):
    """SGD with momentum: one state tensor per matrix, none for biases and norms."""

    @classmethod
    def build(cls, parameters, optim, own, hidden=(), factors=NONE):
        parameters, chosen = list(parameters), optim.hyperparameters(own)
        groups = [
            {"params": [p for p in parameters if p.dim() == 2], "momentum": chosen.beta1},
            {"params": [p for p in parameters if p.dim() == 1], "momentum": 0.0},
        ]
        return cls(torch.optim.SGD(groups), chosen.lr_factor)

    @staticmethod
    def state_names(shape, hidden=False):
        return ("momentum_buffer",) if len(shape) == 2 else ()


def train(rank, world, configs):
    OF_BODY["momentum"] = Momentum
    for config in configs:
        config.optim.name = "momentum"
        train_rank(rank, world, config)


def test_other_states_survive_resume_under_both_engines(tmp_path):
    write_tokens(tmp_path / "tokens")
    settings = {"train__steps": 6, "vocab__tie": "untied", "optim__lr": 0.05}
    straight = config_of(tmp_path / "straight", 2, **settings)
    legs = [
        config_of(tmp_path / "legs", 2, engine="zero0", train__stop_after=2, **settings),
        config_of(tmp_path / "legs", 2, engine="fsdp2", train__stop_after=4, **settings),
        config_of(tmp_path / "legs", 2, engine="zero0", **settings),
    ]
    run_ranks(2, train, [straight, *legs], timeout=120)
    one, other = outcome(tmp_path / "straight"), outcome(tmp_path / "legs")
    body = [name for name in one.tensors if name.startswith("blocks.")]
    states = {name for name in one.tensors if name.startswith("optim.momentum_buffer.blocks.")}
    assert states == {f"optim.momentum_buffer.{name}" for name in body if one.tensors[name].dim() == 2}
    assert {name for name in one.tensors if name.startswith("optim.exp_avg.")} == {
        "optim.exp_avg.embedding.weight",
        "optim.exp_avg.head.weight",
    }
    assert one.tensors.keys() == other.tensors.keys()
    for name in states:
        assert apart(other.tensors[name], one.tensors[name]) < 1e-4, name
    for found, expected in zip(other.losses, one.losses, strict=True):
        assert abs(found - expected) < 1e-5 * expected


def test_planner_counts_states_of_optimizer(tmp_path, monkeypatch):
    monkeypatch.setitem(OF_BODY, "momentum", Momentum)
    write_tokens(tmp_path / "tokens")
    config = config_of(tmp_path / "run", 1)
    config.optim.name = "momentum"
    footprint = body_footprint(config, vocab_workload(config, VOCAB, 1, 4), 1, 1)
    matrices = [shape for shape in footprint.shapes.all if len(shape) == 2]
    assert footprint.states == 4 * sum(shape.numel() for shape in matrices) < 4 * footprint.stepped

"""Muon on sharded matrices matches torch.optim.Muon in one process, with every engine and on any number of ranks."""

import math
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain.build import ENGINES as BUILDERS
from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.resume import check_resumable
from pretrain.checkpoint.state import TrainState
from pretrain.config.engine import DeepSpeedConfig, FSDP2Config
from pretrain.config.job import JobConfig
from pretrain.config.optim import MuonConfig, OptimConfig
from pretrain.data import open_data
from pretrain.mesh import Mesh
from pretrain.optim import lr_at, momentum_at
from pretrain.optim.owners import Cut, Schedule, matrices_of
from tests.pretrain.checkpoint.test_manager import build, fill, is_filled, no_warning
from tests.pretrain.dense import Dense, DenseModel, scale_to_width, windows_of
from tests.pretrain.engine.test_engines import CUT, ENGINES, apart, config_of, outcome, train_ranks
from tests.pretrain.tiny import VOCAB, tiny_config, write_tokens
from tests.ranks import run_ranks

STEPS = 10
STACKED = (5, 3, 2)
VOCABULARY = {"embedding.weight", "head.weight"}
WARM = {"optim__momentum_start": 0.8, "optim__momentum_warmup_steps": 6}
SETTINGS = {
    "fsdp2": FSDP2Config(),
    "hsdp": FSDP2Config(hsdp=True),
    **{f"zero{stage}": DeepSpeedConfig(zero_stage=stage, extra=CUT if stage == 3 else {}) for stage in range(4)},
}


class Block(nn.Module):
    """Its parameters get any gradients: the output is their product with `gradients`, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = {"fused": (10, 6), "wide": (3, 14), "tall": (13, 5), "scale": (7,)}
        for name, shape in self.shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.gradients: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return x + sum((parameter * self.gradients[name]).sum() for name, parameter in self.named_parameters())


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stacked = {"fused": STACKED}
        self.positions = nn.Parameter(torch.empty(4, 5))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.gradient = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.positions * self.gradient).sum()
        for block in self.blocks:
            x = block(x)
        return x

    def initial_rows(self, name: str, seed: int, start: int, stop: int) -> Tensor:
        return drawn(name, self.get_parameter(name).shape)[start:stop]


def drawn(name: str, shape: torch.Size, step: int = -1) -> Tensor:
    """Initial value of a parameter; its gradient at a step."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator).bfloat16().float()  # engines that compute in bf16 round nothing


class Reference:
    """torch.optim.Muon and AdamW on whole parameters. Each matrix of a fused parameter has a parameter of its own."""

    def __init__(
        self, weights: dict[str, Tensor], hidden: dict[str, tuple[int, ...]], optim: MuonConfig, m: float = 1.0
    ) -> None:
        """m: width / optim.base_width."""
        self.hidden, own = hidden, optim.hyperparameters(optim.body)
        self.parts = {
            name: [nn.Parameter(part.detach().clone()) for part in weight.split(hidden.get(name, len(weight)))]
            for name, weight in weights.items()
        }
        matrices = [part for name in hidden for part in self.parts[name]]
        last = [parts[0] for name, parts in self.parts.items() if name.startswith("norm.")]
        others = [
            parts[0]
            for name, parts in self.parts.items()
            if name not in {*hidden, *VOCABULARY} and not name.startswith("norm.")
        ]
        rows, ours = (
            [self.parts[name][0] for name in VOCABULARY & self.parts.keys()],
            optim.hyperparameters(optim.vocab),
        )
        self.muon = torch.optim.Muon(
            [{"params": matrices, "width": m**-0.5}],
            weight_decay=own.weight_decay * m**0.5,
            momentum=optim.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for p in others if p.dim() == 2], "weight_decay": own.weight_decay},
                {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
                *({"params": [p], "weight_decay": 0.0, "width": 1 / m, "eps": own.eps} for p in last),
                *(
                    {
                        "params": [row],
                        "weight_decay": ours.weight_decay,
                        "factor": ours.lr_factor,
                        "betas": (ours.beta1, ours.beta2),
                    }
                    for row in rows
                ),
            ],
            betas=(own.beta1, own.beta2),
            eps=own.eps / m,
            fused=True,
        )

    def step(self, gradients: dict[str, Tensor], lr: float, share: float = 1.0, momentum: float = 0.95) -> None:
        """share: of the weight decay of all but the vocabulary. momentum: of Muon."""
        for name, parts in self.parts.items():
            for part, gradient in zip(parts, gradients[name].split([len(part) for part in parts]), strict=True):
                part.grad = gradient.clone()
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1.0) * group.get("width", 1.0)
                if "factor" not in group:
                    group["weight_decay"] = group.setdefault("at_peak", group["weight_decay"]) * share
                if "momentum" in group:
                    group["momentum"] = momentum
            optimizer.step()

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: torch.cat([part.detach() for part in parts]) for name, parts in self.parts.items()}

    @property
    def momentum(self) -> dict[str, Tensor]:
        states = self.muon.state
        return {name: torch.cat([states[part]["momentum_buffer"] for part in self.parts[name]]) for name in self.hidden}


def in_its_dtype():
    """Lets torch.optim.Muon orthogonalise in the dtype of the gradient: it always takes bf16."""
    return patch.object(Tensor, "bfloat16", Tensor.clone)


def given_gradients(
    rank: int, world: int, engines: list[str], precision: str, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Steps each engine and torch's optimizers on the same gradients. Returns the matrices' largest relative distances.

    precision: of Newton-Schulz. dtype: of the engine.
    """
    optim = MuonConfig(lr=0.02, newton_schulz=precision, weight_decay=0.3)
    far = {}
    for name in engines:
        mesh = Mesh.of(max(1, world // 2), torch.device("cpu"))
        with torch.device("meta"):
            body = Body()
        engine = BUILDERS[type(SETTINGS[name])](SETTINGS[name], optim, dtype, 0)
        shapes = {key: parameter.shape for key, parameter in body.named_parameters()}
        forward = engine.wrap(body, mesh)
        hidden = {key: STACKED if key.endswith("fused") else shape[:1] for key, shape in shapes.items()}
        hidden = {key: tuple(rows) for key, rows in hidden.items() if "blocks" in key and len(shapes[key]) == 2}
        truth = Reference({key: drawn(key, shape) for key, shape in shapes.items()}, hidden, optim)
        for step in range(STEPS):
            whole = {key: drawn(key, shape, step) for key, shape in shapes.items()}
            mine = {key: gradient if rank == 0 else torch.zeros_like(gradient) for key, gradient in whole.items()}
            body.gradient = mine["positions"]
            for i, block in enumerate(body.blocks):
                block.gradients = {key.split(".")[-1]: g for key, g in mine.items() if f"blocks.{i}." in key}
            engine.backward(forward(torch.zeros((), requires_grad=True)), last_micro_batch=True)
            lr, clip = optim.lr / (step + 1), 0.37
            engine.step(lr, clip)
            with in_its_dtype() if precision == "fp32" else patch.dict({}):
                truth.step({key: gradient * clip for key, gradient in whole.items()}, lr)
        state = {key: tensor.full_tensor() for key, tensor in engine.state().items()}
        expected = truth.weights | {f"optim.momentum_buffer.{key}": mean for key, mean in truth.momentum.items()}
        assert state.keys() > expected.keys() and not any(f"optim.exp_avg.{key}" in state for key in hidden)
        distances = {key: apart(state[key], value) for key, value in expected.items()}
        assert max(distances.values()) < 1e-6, name  # the last bit of AdamW's kernel depends on where a number lies
        far[name] = max(distances[key] for key in distances if key in hidden or key.startswith("optim."))
    return far


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ten_steps_on_given_gradients_equal_torch(world):
    """Bit for bit, in bf16 as torch's; on three ranks DeepSpeed's mean over ranks rounds: fp32, to 1e-6."""
    engines = [name for name in SETTINGS if name != "hsdp" or world in (2, 4)]
    exact = [name for name in engines if world != 3 or name == "fsdp2"]
    for far in run_ranks(world, given_gradients, exact, "bf16", timeout=120):
        assert far == dict.fromkeys(exact, 0.0)
    rounding = [name for name in engines if name not in exact]
    if rounding:
        for far in run_ranks(world, given_gradients, rounding, "fp32", timeout=120):
            assert far.keys() == set(rounding) and max(far.values()) < 1e-6, far


def test_engines_that_compute_in_bf16_give_the_same_bits():
    """DeepSpeed has another optimizer at stage 1 in bf16."""
    for far in run_ranks(2, given_gradients, list(SETTINGS), "bf16", torch.bfloat16, timeout=120):
        assert far == dict.fromkeys(SETTINGS, 0.0)


def first_steps(rank: int, world: int, factors: list[float]) -> list[dict[str, Tensor]]:
    """Weights of the matrices after one step without weight decay, for each factor of the clip."""
    mesh, found = Mesh.of(world, torch.device("cpu")), []
    for factor in factors:
        with torch.device("meta"):
            body = Body()
        optim = MuonConfig(lr=6e-4, weight_decay=0.0)
        engine = BUILDERS[FSDP2Config](FSDP2Config(), optim, torch.float32, 0)
        forward = engine.wrap(body, mesh)
        body.gradient = drawn("positions", torch.Size((4, 5)), 0)
        for block in body.blocks:
            block.gradients = {name: drawn(name, parameter.shape, 0) for name, parameter in block.named_parameters()}
        engine.backward(forward(torch.zeros((), requires_grad=True)), last_micro_batch=True)
        engine.step(0.01, factor)
        state = engine.state()
        found.append({name: state[name].full_tensor() for name in state if name.endswith(("fused", "wide", "tall"))})
    return found


def test_clip_does_not_shrink_the_update():
    """The gradient is clipped before Newton-Schulz, which divides by the norm. A power of two rounds nothing."""
    for one, quarter in run_ranks(2, first_steps, [1.0, 0.25]):
        hidden = [name for name in one if not name.startswith("optim.")]
        assert len(hidden) == 6
        for name in hidden:
            assert torch.equal(one[name], quarter[name])
            update = (one[name] - drawn(name, one[name].shape)).norm() / math.sqrt(one[name].numel())
            assert 0.5 * 0.2 * 0.01 < update < 1.5 * 0.2 * 0.01  # the RMS of AdamW's update


def scheduled_steps(rank: int, world: int, engines: list[str], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Whole tensors after three steps with schedules of weight decay and momentum, for each engine.

    The gradient of the fused matrix is the same in each step, all others are zeros.
    """
    optim, found = MuonConfig(lr=0.5, weight_decay=0.25, weight_decay_schedule="lr"), []
    for name in engines:
        with torch.device("meta"):
            body = Body()
        engine = BUILDERS[type(SETTINGS[name])](SETTINGS[name], optim, dtype, 0)
        forward = engine.wrap(body, Mesh.of(world, torch.device("cpu")))
        body.gradient = torch.zeros(4, 5)
        for block in body.blocks:
            given = {key: drawn(key, shape, 0) * (key == "fused" and rank == 0) for key, shape in block.shapes.items()}
            block.gradients = given
        for lr, momentum in ((0.25, 0.5), (0.5, 0.75), (0.125, 0.875)):
            engine.backward(forward(torch.zeros((), requires_grad=True)), last_micro_batch=True)
            engine.step(lr, 1.0, momentum)
        found.append({key: tensor.full_tensor() for key, tensor in engine.state().items()})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_and_momentum_follow_their_schedules(dtype):
    """Computed by hand: a step multiplies by 1 - lr · 0.25 · lr / 0.5, and the momentum of a constant gradient G is
    0.5·G, then (0.75·0.5 + 0.25)·G, then (0.875·0.625 + 0.125)·G.
    """
    shrunk = (1 - 0.25 * 0.125) * (1 - 0.5 * 0.25) * (1 - 0.125 * 0.0625)
    engines = [name for name in SETTINGS if name != "hsdp"]
    for states in run_ranks(2, scheduled_steps, engines, dtype, timeout=120):
        for state in states:
            for name in ("positions", "blocks.1.wide", "blocks.1.tall"):
                assert torch.allclose(state[name], drawn(name, state[name].shape) * shrunk, rtol=1e-6), name
            assert torch.equal(state["blocks.1.scale"], drawn("blocks.1.scale", torch.Size((7,))))
            mean = state["optim.momentum_buffer.blocks.1.fused"]
            assert torch.allclose(mean, drawn("fused", mean.shape, 0) * 0.671875, rtol=1e-6)


def test_momentum_rises_to_its_value():
    warm = MuonConfig(momentum_start=0.85, momentum_warmup_steps=4)
    assert [momentum_at(warm, step) for step in range(6)] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    assert [momentum_at(MuonConfig(momentum=0.9), step) for step in (0, 299)] == [0.9, 0.9]
    assert momentum_at(OptimConfig(), 0) is None


def test_momentum_warmup_in_tokens(tmp_path):
    config = muon_config(tmp_path / "run", 1, **WARM | {"optim__momentum_warmup_steps": "1k tokens"})
    assert config.optim.momentum_warmup_steps == 3  # 63 windows of 16 tokens, 24 in a step


def dense_training(config: JobConfig) -> Dense:
    """Trains with torch.optim.Muon in fp32, AdamW for the rest, and the clip over all."""
    model, width = DenseModel(config, torch.float32), config.model.width
    scale_to_width(model.body, width / 7)
    weights = dict(model.body.named_parameters())
    hidden = {
        name: tuple(weight.shape[:1]) for name, weight in weights.items() if "blocks" in name and weight.dim() == 2
    }
    hidden |= {name: (width,) * 3 for name in hidden if "qkv" in name}
    weights |= {"embedding.weight": model.weight, "head.weight": model.head_weight}
    reference, losses, norms = Reference(weights, hidden, config.optim, width / 7), [], []
    for step in range(config.train.steps):
        loss = model.loss(*windows_of(config, step))
        losses.append(float(loss.detach()))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), config.optim.clip)))
        lr, momentum = lr_at(config.optim, step, config.train.steps), 0.8 + (0.95 - 0.8) * min(1, step / 6)
        with in_its_dtype():
            reference.step({n: w.grad for n, w in weights.items()}, lr, lr / config.optim.lr, momentum)
        for name, value in reference.weights.items():
            weights[name].data, weights[name].grad = value, None
    return Dense(
        losses, norms, reference.weights | {f"optim.momentum_buffer.{n}": m for n, m in reference.momentum.items()}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    write_tokens(folder / "tokens")
    return folder


@pytest.fixture(scope="module")
def truth(folder) -> Dense:
    return dense_training(muon_config(folder / "dense", 1))


def muon_config(run: Path, world: int, engine: str = "fsdp2", **changes: object) -> JobConfig:
    settings = {
        "optim__name": "muon",
        "vocab__tie": "untied",
        "optim__vocab": {"lr": 5e-3, "beta2": 0.9, "weight_decay": 0.2},
        "optim__body": {"weight_decay_schedule": "lr"},
        "optim__base_width": 7,  # a third of the width
        "optim__clip": 0.1,
        **WARM,
    }
    return config_of(run, world, 2, engine, **settings | changes)


@pytest.mark.parametrize("world,engines", [(2, list(ENGINES)), (3, ["fsdp2"])])
def test_ten_steps_of_training_match_dense(folder, truth, world, engines):
    """The accuracy is that of AdamW's test: fp32 gradients differ in the last digits, which Newton-Schulz amplifies."""
    configs = [muon_config(folder / f"{engine}-{world}", world, engine) for engine in engines]
    run_ranks(world, train_ranks, configs, timeout=120)
    assert min(truth.norms) > 0.1, "the clip must be active"
    for config in configs:
        run = outcome(config.run_dir)
        np.testing.assert_allclose(run.losses, truth.losses, rtol=1e-5)
        np.testing.assert_allclose(run.norms, truth.norms, rtol=1e-5)
        for name, weight in truth.weights.items():
            assert apart(run.tensors[name], weight) <= 1e-5, (config.run_dir.name, name)


def pass_on(rank: int, world: int, run: Path, engine: str, step: int) -> bool:
    """Saves filled tensors as step 0, or loads the newest checkpoint; saves it as `step`. True if no bit changed."""
    manager = build(run, world, optim__name="muon", engine=ENGINES[engine], vocab__parallel="1")
    if step == 0:
        fill(manager)
    else:
        manager.restore(no_warning)
    manager.save(TrainState(step=step))
    manager.wait()
    names = manager.model.tensors().keys()
    assert "optim.momentum_buffer.blocks.0.mlp.up.weight" in names and "optim.exp_avg.positions" in names
    assert not any(
        name.startswith("optim.exp_avg.blocks") and name.endswith("weight") for name in names if "norm" not in name
    )
    return is_filled(manager)


def test_momentum_survives_other_engines_and_worlds_bit_for_bit(tmp_path):
    chain = [("fsdp2", 2), ("zero1", 3), ("hsdp", 4), ("zero3", 4), ("zero0", 2), ("zero2", 3), ("fsdp2", 1)]
    for step, (engine, world) in enumerate(chain):
        assert all(run_ranks(world, pass_on, tmp_path, engine, step)), (engine, world)
    assert len(checkpoints(tmp_path)) == len(chain)


@pytest.mark.parametrize(
    "setting,message",
    [
        (
            {"engine__offload": "cpu"},
            "engine.offload=cpu must be none with optim.name=muon: .*; give engine.offload=none",
        ),
        ({"optim__momentum": 1.0}, r"optim.momentum=1.0 must be in \[0, 1\)"),
        (
            {"optim__momentum_start": 0.99},
            r"optim.momentum_start=0.99 must be at least 0, and at most optim.momentum=0.95",
        ),
        ({"optim__momentum_warmup_steps": 0}, "optim.momentum_warmup_steps=0 must be at least 1"),
        ({"optim__newton_schulz": "fp16"}, "optim.newton_schulz=fp16 must be auto, bf16 or fp32"),
        ({"optim__name": "adamw", "optim__momentum": 0.9}, "unknown key optim.momentum"),
    ],
)
def test_invalid_setting_raises(tmp_path, setting, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        tiny_config(tmp_path / "tokens", tmp_path / "run", **{"optim__name": "muon"} | setting)


def test_run_keeps_its_optimizer(tmp_path):
    """A checkpoint without a name is older than the setting: AdamW's."""
    config = tiny_config(write_tokens(tmp_path / "tokens"), tmp_path / "run", optim__name="muon")
    old = asdict(config)
    del old["optim"]
    facts = {"vocab_size": VOCAB, "tokenizer_fingerprint": None, "step": 1, "samples": {}}
    manifest = {"config": old | {"optim": {"lr": 1.0}}, **facts}
    with pytest.raises(ValueError, match=r"holds a run with optim\.name=adamw, this command has muon: choose another"):
        check_resumable(config, open_data(config.data), VOCAB, manifest)
    check_resumable(config, open_data(config.data), VOCAB, manifest | {"config": asdict(config)})
    check_resumable(config, open_data(config.data), VOCAB, manifest | {"weights_only": True})


@pytest.mark.parametrize("ranks", [1, 3, 8, 64])
def test_owners_have_equal_work(ranks):
    shapes = 6 * [((48, 16), (16, 24, 8)), ((16, 16), (16,)), ((16, 64), (16,)), ((64, 16), (64,))]
    schedule = Schedule(matrices_of((*one, Cut(one[0][0] * one[0][1] // 3)) for one in shapes), ranks)
    assert sorted(i for mine in schedule.owned for i in mine) == list(range(len(schedule.matrices))) == list(range(36))
    assert sorted(i for one in schedule.rounds for mine in one for i in mine) == list(range(36))
    costs = [matrix.flops for matrix in schedule.matrices]
    assert schedule.flops <= sum(costs) / ranks + max(costs)
    assert schedule.matrices[1].numbers == 24 * 16 and schedule.matrices[1].start == 16 * 16

"""Schedule, parameter groups and clip match values computed by hand."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pretrain.config.lengths import Batches
from pretrain.config.optim import OptimConfig, OwnerConfig
from pretrain.optim import body_optimizer, clip_factor, local, lr_at, read_norm
from pretrain.optim.adamw import AdamW
from tests.ranks import run_ranks


def test_cosine_peaks_at_lr_and_ends_at_floor():
    config = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [lr_at(config, step, 24) for step in range(24)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert lr_at(OptimConfig(lr=1.0, warmup_steps=0, min_lr_ratio=0.2), 10, 21) == pytest.approx(0.6)  # half-way


def test_wsd_is_constant_then_linear_to_floor():
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, min_lr_ratio=0.0, decay_fraction=0.4)
    rates = [lr_at(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert lr_at(OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, decay_fraction=0.0), 9, 10) == 1.0  # no decay


def test_decay_steps_replace_the_fraction():
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, min_lr_ratio=0.0, decay_steps=4)
    rates = [lr_at(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_rates_follow_the_samples_while_batches_grow():
    """The rate of a step that begins at sample n is that of n in a run with batches of 1."""
    batches = Batches.of(1, {"6 samples": 2, "14 samples": 3}, 1)  # steps begin at 0 to 6, 8 … 14, 17 …
    begins = [batches.samples_after(step) for step in range(16)]
    assert begins == [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 23, 26, 29]
    wsd = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=8, min_lr_ratio=0.1, decay_steps=4)
    rates = [lr_at(wsd, step, 16, batches.samples_after) for step in range(16)]
    assert rates[:8] == pytest.approx([begin / 10 for begin in begins[1:9]]), "warm-up over the first 10 samples"
    assert rates[8:11] == [1.0] * 3
    assert rates[11:] == pytest.approx([1 - 0.9 * (begin - 17) / 12 for begin in begins[11:]]), "it ends at the floor"
    cosine = OptimConfig(lr=1.0, warmup_steps=2, min_lr_ratio=0.1)
    rates = [lr_at(cosine, step, 16, batches.samples_after) for step in range(16)]
    alone = [lr_at(cosine, sample, 30) for sample in range(30)]
    assert rates[2:] == pytest.approx([alone[begin] for begin in begins[2:]])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 5, 19, 60, 999, 1000, 100_000])
@pytest.mark.parametrize("decay_fraction", [0.0, 0.2, 0.95, 1.0])
def test_default_warmup_fits_every_run(schedule, steps, decay_fraction):
    config = OptimConfig(lr=1.0, schedule=schedule, decay_fraction=decay_fraction)
    config.check_steps(steps)
    rates = [lr_at(config, step, steps) for step in range(min(steps, 4000))]
    warmup = config.warmup(steps)
    assert warmup <= min(2000, steps // 10)
    assert rates[:warmup] == sorted(rates[:warmup])
    if steps >= 10:
        assert max(rates) == pytest.approx(1.0, rel=1 / steps), "the rate must reach its peak"


def test_default_warmup_is_a_tenth_but_at_most_2000_steps():
    assert [OptimConfig().warmup(steps) for steps in (1000, 20_000, 50_000)] == [100, 2000, 2000]


@pytest.mark.parametrize(
    "setting,steps,message",
    [
        ({"warmup_steps": 100}, 60, "optim.warmup_steps=100 must be below train.steps=60"),
        ({"warmup_steps": 60}, 60, "optim.warmup_steps=60 must be below train.steps=60"),
        (
            {"schedule": "wsd", "warmup_steps": 90, "decay_fraction": 0.5},
            100,
            "optim.warmup_steps=90 and the 50 steps of optim.decay_fraction=0.5 must not overlap in train.steps=100",
        ),
    ],
)
def test_too_long_schedule_raises(setting, steps, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**setting).check_steps(steps)


def test_too_long_decay_raises():
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=5 and optim\.decay_steps=96 must not overlap in"):
        OptimConfig(schedule="wsd", warmup_steps=5, decay_steps=96).check_steps(100)


def test_longest_schedule_is_accepted():
    OptimConfig(warmup_steps=59).check_steps(60)
    OptimConfig(schedule="wsd", warmup_steps=50, decay_fraction=0.5).check_steps(100)
    OptimConfig(warmup_steps=90, decay_fraction=0.5).check_steps(100)  # a cosine has no separate decay


def test_only_matrices_decay():
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optim = OptimConfig(lr=1e-3, weight_decay=0.5)
    optimizer = body_optimizer(optim).build([matrix, bias], optim, optim.body)
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step(lr=0.1)
    assert torch.allclose(matrix, torch.full((2, 2), 1 - 0.1 * 0.5))
    assert torch.equal(bias, torch.ones(2))


def test_clip_covers_both_owners():
    norm, loss = read_norm(torch.tensor(3.0), torch.tensor([4.0, 2.5]))
    assert (norm, loss) == (5.0, 2.5)
    assert clip_factor(norm, clip=1.0) == pytest.approx(0.2, rel=1e-6)
    assert clip_factor(norm, clip=6.0) == clip_factor(norm, clip=0.0) == 1.0


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"lr": 0.0}, "optim.lr=0.0 must be positive"),
        ({"lr": float("nan")}, "optim.lr=nan must be positive"),
        ({"clip": -1.0}, "optim.clip=-1.0 must be a number of at least 0"),
        ({"schedule": "linear"}, "optim.schedule=linear must be cosine or wsd"),
        ({"weight_decay_schedule": "linear"}, "optim.weight_decay_schedule=linear must be constant or lr"),
        (
            {"vocab": OwnerConfig(weight_decay_schedule="cosine")},
            "optim.vocab.weight_decay_schedule=cosine must be constant or lr",
        ),
        ({"beta2": 1.0}, r"optim.beta2=1.0 must be in \[0, 1\)"),
        ({"decay_fraction": 1.5}, r"optim.decay_fraction=1.5 must be in \[0, 1\]"),
    ],
)
def test_invalid_setting_raises(setting, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**setting)


def adamw_steps(rank: int, world: int) -> None:
    """Our step of DTensors against torch's: same bits, for even and uneven shards, 2-d and 1-d."""
    mesh = init_device_mesh("cpu", (world,))
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(5, 3, generator=generator), "b": torch.randn(7, generator=generator)}

    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values.values()]

    config = OptimConfig(lr=6e-4, weight_decay=0.1)
    ours, theirs = (AdamW.build(parameters(), config, config.body) for _ in range(2))
    ours.load(0)
    theirs.load(0)
    for step in range(3):
        for optimizer in (ours, theirs):
            for parameter in optimizer.parameters:
                parameter.grad = parameter.detach().cos() * (step + 1)
        ours.step(0.01)
        theirs.set_lr(0.01)
        theirs.stepper.step()
    for mine, other in zip(ours.parameters, theirs.parameters, strict=True):
        assert torch.equal(mine.to_local(), other.to_local())
        for name, state in ours.state_of(mine).items():
            expected = theirs.state_of(other)[name]
            assert type(state) is type(expected) and torch.equal(local(state), local(expected)), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_adamw_on_local_parts_keeps_every_bit(world):
    run_ranks(world, adamw_steps)

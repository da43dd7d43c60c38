"""launch/plan.py: its bytes against the counted ones, its memory against the measured, and the command."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from launch.step import Step
from pretrain import config as configuration
from pretrain.vocab.kernels.torch import TorchKernels
from tests.launch.simulate import simulate

ROOT = Path(__file__).parents[2]
GPU = TorchKernels(slab_bytes=2**28, memory_mib=896)  # chunks as a GPU's, in plain torch


def configured(*overrides):
    configuration.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return configuration.build(compose("train", ["run.dir=runs/a", "data.path=data/a", *overrides]))


def text_like(ranks, sequences, length, rows):
    """Zipf's law: low ids are frequent."""
    frequency = 1.0 / torch.arange(1, rows + 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(frequency, ranks * sequences * length, replacement=True, generator=generator)
    return list(ids.view(ranks, sequences, length))


def step_of(config, rows, parallel, world, kernels):
    dtype = config.train.compute_dtype("cpu")
    work = configuration.vocab_workload(config, rows, world, dtype.itemsize)
    return Step(config, work, parallel, world, dtype, kernels)


def both(config, rows, parallel, world, kernels=GPU):
    """The plan's step, and the simulated one."""
    ids = text_like(parallel, config.train.micro_batch, config.seq_len, rows)
    return step_of(config, rows, parallel, world, kernels), simulate(config, rows, parallel, world, ids, kernels)


def told(step, lookup):
    """calls and bytes of each (axis, kind), an axis of all ranks being the world."""
    calls, given = Counter(), Counter()
    for one in step.transfers(lookup):
        axis = "world" if one.ranks == step.world else one.axis
        calls[axis, one.kind] += one.calls
        given[axis, one.kind] += one.given
    return calls, given


SMALL = ["model=nano", "model.layers=2", "train.micro_batch=2", "train.seq_len=128"]


@pytest.mark.parametrize(
    "world,parallel,settings",
    [
        (2, 1, []),
        (8, 8, ["vocab.tie=untied", "vocab.label_smoothing=0.1"]),
        (24, 3, ["engine.hsdp=true"]),
        (24, 8, ["engine.reshard_after_forward=false", "engine.activation_checkpointing=block"]),
        (1024, 8, []),
        (1024, 1024, []),
        (1024, 16, ["engine.hsdp=true"]),
    ],
)
def test_a_step_gives_to_collectives_what_the_plan_says(world, parallel, settings):
    config = configured(*SMALL, f"train.global_batch={2 * 2 * world}", *settings)
    step, seen = both(config, 5000, parallel, world)
    assert told(step, seen.lookup) == (seen.calls, seen.given)

"""launch/rehearsal.py accepts what can be trained, and reports what would fail on the cluster."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launch.rehearsal import rehearse
from pretrain.families.gpt2 import GPT2Config
from pretrain.models.gpt2 import Body
from tests.benchmarks.plan import configured


@pytest.mark.parametrize(
    "parallel,world,settings",
    [
        (1, 1, ["data.documents=masked"]),
        (8, 8, ["vocab.tie=untied", "engine.hsdp=true", "engine.compile=true"]),
        (8, 64, ["engine=deepspeed", "engine.zero_stage=3", "engine.activation_checkpointing=selective"]),
        (1024, 1024, ["train.precision=fp32"]),
        (8, 16, ["vocab.untie_at=7", "vocab.embed_scale=2.0", "vocab.input_grad_scale=0.5"]),
    ],
)
def test_a_step_goes_through(parallel, world, settings):
    config = configured("model=gpt2", "train.micro_batch=1", "train.seq_len=64", "train.global_batch=2048", *settings)
    rehearse(config, 50_257, parallel, world)
    assert not dist.is_initialized()


def test_a_step_goes_through_where_torch_has_several_threads():
    """Every test runs with OMP_NUM_THREADS=1, a user's machine does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        config = configured("model=nano", "train.micro_batch=1", "train.seq_len=32", "train.global_batch=2")
        rehearse(config, 300, 1, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@dataclass
class Clashing(GPT2Config):
    """Fakes a norm over more numbers than a token has."""

    def body(self) -> Body:
        body = super().body()
        body.norm = nn.LayerNorm(self.width + 1)
        return body


class Reading(Body):
    """Checks in another way than the others."""

    def forward(self, hidden_BTD, starts_BT=None):
        if (hidden_BTD == 0).all():
            raise ValueError("all hidden states are zero")
        return super().forward(hidden_BTD, starts_BT)


@dataclass
class ReadingConfig(GPT2Config):
    def body(self) -> Body:
        return Reading(self)


def test_check_outside_of_violated_is_named():
    config = configured("model=nano", "train.seq_len=64", "train.global_batch=64")
    reading = replace(config, model=ReadingConfig(layers=1, width=64, heads=1, context=64))
    with pytest.raises(ValueError, match=r"reads a condition.*check it with pretrain\.vocab\.checks\.violated"):
        rehearse(reading, 300, 4, 8)


def test_shapes_that_clash_are_one_error():
    config = configured("model=nano", "train.seq_len=64", "train.global_batch=64")
    broken = replace(config, model=Clashing(layers=1, width=64, heads=1, context=64))
    with pytest.raises(ValueError, match=r"a training step on 8 ranks would fail: .*normalized_shape"):
        rehearse(broken, 300, 4, 8)
    assert not dist.is_initialized()

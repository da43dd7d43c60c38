"""Lengths in steps, samples and tokens; batch sizes over samples, against a count step by step."""

import pytest

from pretrain.config.lengths import Batches, Length, length_of
from pretrain.config.training import TrainingConfig
from tests.pretrain.tiny import tiny_config

SEQ_LEN = 10
SCHEDULES = [{}, {"80 samples": 8, "2k": 16}, {"7 samples": 4, "9 samples": 12, "10 samples": 2}, {"1_005": 1}]


@pytest.mark.parametrize(
    "value,length",
    [
        (1000, (1000, "steps")),
        ("2k", (2000, "steps")),
        (1e9, (10**9, "steps")),
        ("1e9", (10**9, "steps")),
        ("1_000_000", (10**6, "steps")),
        ("10B tokens", (10**10, "tokens")),
        ("1.5Btokens", (15 * 10**8, "tokens")),
        ("500M_tokens", (5 * 10**8, "tokens")),
        ("2.5M samples", (2_500_000, "samples")),
        ("15T tokens", (15 * 10**12, "tokens")),
        ("3 steps", (3, "steps")),
    ],
)
def test_length_is_read(value, length):
    assert length_of("train.steps", value) == Length(*length)


@pytest.mark.parametrize(
    "value", ["many", "", "1.5", "0.0001k", "-3", "10G tokens", "10B token s", "tokens", "1e-3", True]
)
def test_other_text_is_refused(value):
    with pytest.raises(ValueError, match=rf"^train\.steps={value} must be a whole number of steps, samples or tokens"):
        length_of("train.steps", value)


@pytest.mark.parametrize("later", SCHEDULES)
def test_batches_match_a_count_step_by_step(later):
    batches, begins = Batches.of(4, later, SEQ_LEN), [0]
    for _ in range(200):
        begins.append(begins[-1] + batches.size_at(begins[-1]))
    for step in range(100):
        assert batches.samples_after(step) == begins[step]
        assert batches.samples_after(17, begins[step]) == begins[step + 17]
    assert batches.samples_after(-2) == -8
    for samples in range(150):
        assert batches.steps_for(samples) == next(step for step, begin in enumerate(begins) if begin >= samples)


def test_tokens_are_rounded_up_to_samples_and_steps():
    batches = Batches.of(4, {"80 samples": 8}, SEQ_LEN)
    assert batches.sizes == ((0, 4), (80, 8)) == Batches.of(4, {"791": 8}, SEQ_LEN).sizes
    assert batches.steps("k", "800 tokens") == 20 and batches.steps("k", "801 tokens") == 21
    assert batches.steps("k", "80 samples", since=10) == 10 + 5, "40 samples in fours, then 40 in eights"
    assert batches.steps("k", "80 samples", until=25) == 5 + 10, "40 samples in eights, before them 40 in fours"
    assert batches.steps("k", "81 samples", until=25) == 16
    assert batches.steps("k", "200 samples", until=25) == 26, "longer than the run: check_steps refuses it"


def test_all_lengths_of_a_run_are_converted(tmp_path):
    lengths = {"train__steps": "20k tokens", "train__stop_after": "480 samples", "optim__warmup_steps": "1920 tokens"}
    decay = {"optim__schedule": "wsd", "optim__decay_steps": "4k tokens"}
    config = tiny_config(tmp_path, tmp_path / "run", **lengths, **decay)  # 12 samples of 16 tokens per step
    assert (config.train.steps, config.train.stop_after) == (105, 40)
    assert (config.optim.warmup_steps, config.optim.decay_steps) == (10, 21)


def test_entry_at_0_replaces_the_batch(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", train__batch_schedule={0: 6, "1920": 24})
    assert config.train.global_batch == 6 and config.train.batches.sizes == ((0, 6), (120, 24))
    assert config.train.batches.largest == 24


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"steps": "0 tokens"}, "train.steps=0 tokens must be at least 1"),
        ({"stop_after": -1}, "train.stop_after=-1 must be a whole number of steps, samples or tokens"),
        ({"batch_schedule": {"5 steps": 8}}, "train.batch_schedule.5 steps=8 must begin at a number of tokens or"),
        ({"batch_schedule": {"soon": 8}}, "train.batch_schedule=soon must be a whole number"),
        ({"batch_schedule": {"2k": 0}}, "train.batch_schedule.2k=0 must be at least 1"),
    ],
)
def test_wrong_length_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**setting)


def test_entries_at_one_sample_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train\.batch_schedule\.64=24 must begin at another sample"):
        tiny_config(tmp_path, tmp_path / "run", train__batch_schedule={"4 samples": 12, "64": 24})


def test_every_batch_is_checked_against_the_ranks(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", train__batch_schedule={"2k": 24, "4k": 40})
    with pytest.raises(ValueError, match=r"× 2 ranks = 6 must divide train\.batch_schedule\.4k=40; give .*=36 or 42"):
        config.train.check_world(2)

"""Spikes are found by robust statistics, and settings of the guard are checked."""

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from pretrain.config.guard import GuardConfig
from pretrain.spikes import Spikes
from tests.pretrain.tiny import tiny_config


def filled(window: int = 32, noise: float = 0.1, outliers: int = 0) -> Spikes:
    random = np.random.default_rng(0)
    spikes = Spikes(window, threshold=6.0)
    for i in range(window):
        high = i < outliers
        spikes.add(3.0 + noise * random.standard_normal() + 50 * high, math.exp(noise * random.standard_normal()))
    return spikes


def test_only_values_far_above_the_median_are_spikes():
    spikes = filled()
    assert not spikes.found(3.2, 1.2) and not spikes.found(0.5, 0.01), "low values are none"
    assert spikes.found(4.5, 1.0).startswith("loss 4.5 (median ")
    assert spikes.found(3.0, 25.0).startswith("gradient norm 25 (median ")


def test_spikes_in_the_window_hide_no_other():
    spikes = filled(outliers=10)
    assert spikes.found(53.0, 1.0) and not spikes.found(3.1, 1.0)


def test_a_window_without_noise_allows_small_changes():
    spikes = filled(noise=0.0)
    assert not spikes.found(3.1, 19.0) and spikes.found(3.2, 1.0) and spikes.found(3.0, 21.0)


def test_until_the_window_is_full_only_numbers_that_are_not_finite_are_spikes():
    spikes = Spikes(8, threshold=6.0)
    for _ in range(7):
        spikes.add(3.0, 1.0)
    assert not spikes.found(100.0, 100.0)
    assert spikes.found(math.nan, 1.0) and spikes.found(3.0, math.inf)
    spikes.add(3.0, 1.0)
    assert spikes.found(100.0, 1.0)


def test_recorded_runs_have_no_false_alarm():
    """11,000 steps of four runs on Python source. The limits were chosen on other runs: see docs/training.md.

    curves.npz has the differences of loss and gradient norm of each run, in thousandths, from metrics.jsonl.
    """
    config, found, steps = GuardConfig(), [], 0
    for differences in np.load(Path(__file__).with_name("curves.npz")).values():
        curve = differences.cumsum(axis=0, dtype=np.int64) / 1000
        spikes, steps = Spikes(config.window, config.threshold), steps + len(curve)
        for loss, norm in curve.tolist():
            found += [why] if (why := spikes.found(loss, norm)) else []
            spikes.add(loss, norm)
        assert curve[0, 0] > 6 > 4 > curve[-1, 0] and spikes.found(curve[-1, 0] + 3, curve[-1, 1])
    assert steps == 11_000 and not found


@pytest.mark.parametrize(
    "rules,message",
    [
        ({"every": 0}, "checkpoint.every=0 must be positive"),
        ({"every": 4, "keep": 2}, r"keep=2 must be at least 3 \(or 0: all\), to reach back guard.margin=8 steps"),
        ({"every": 500, "keep": 1}, "keep=1 must be at least 2"),
        *(({"every": 4, "keep": keep, "keep_every": more}, None) for keep, more in ((3, 0), (0, 0), (1, 16))),
    ],
)
def test_a_rollback_needs_checkpoints_from_before_its_margin(tmp_path, rules, message):
    settings = {f"checkpoint__{key}": value for key, value in rules.items()}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, tmp_path / "run", guard__level="rollback", **settings)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"level": "on"}, "guard.level=on must be one of off, warn, clip, skip, rollback"),
        ({"window": 4}, "guard.window=4 must be at least 8"),
        ({"patience": 0}, "guard.patience=0 must be at least 1"),
        ({"threshold": 0.0}, "guard.threshold=0.0 must be positive"),
    ],
)
def test_invalid_setting_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**settings)

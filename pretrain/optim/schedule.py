"""Schedules of learning rate and momentum. Separate from the settings, which give only the lengths of their parts."""

import math
from collections.abc import Callable

from ..config.optim import MuonConfig, OptimConfig


def lr_at(optim: OptimConfig, step: int, steps: int, clock: Callable[[int], int] = int) -> float:
    """Learning rate of step `step` (counted from 0) in a schedule of `steps` steps.

    clock: progress at a step, as `TrainingConfig.clock`. Warm-up and decay begin and end at steps. In between the rate
    follows the progress: if batches grow, the samples instead of the steps.
    """
    warmup = optim.warmup(steps)
    if step < warmup:
        return optim.lr * clock(step + 1) / clock(warmup)
    floor, now, last = optim.lr * optim.min_lr_ratio, clock(step), clock(steps - 1)
    if optim.schedule == "cosine":
        done = (now - clock(warmup)) / max(1, last - clock(warmup))
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay = optim.decay(steps)
    if decay == 0:
        return optim.lr
    left = (last - now) / (last - clock(steps - 1 - decay))
    return floor + (optim.lr - floor) * min(1.0, max(0.0, left))


def momentum_at(optim: OptimConfig, step: int) -> float | None:
    """Momentum of Muon's matrices at step `step` (counted from 0); None: the optimizer has none."""
    if not isinstance(optim, MuonConfig):
        return None
    if optim.momentum_start is None or step >= optim.momentum_warmup_steps:
        return optim.momentum
    return optim.momentum_start + (optim.momentum - optim.momentum_start) * step / optim.momentum_warmup_steps

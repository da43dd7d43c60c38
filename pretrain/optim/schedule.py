"""Learning rate schedule. Separate from the settings, which give only the lengths of its parts."""

import math
from collections.abc import Callable

from ..config.optim import OptimConfig


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

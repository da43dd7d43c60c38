"""Learning rate schedule. Separate from the settings, which give only the lengths of its parts."""

import math

from ..config.optim import OptimConfig


def lr_at(optim: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (counted from 0) in a schedule of `steps` steps."""
    warmup = optim.warmup(steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    floor = optim.lr * optim.min_lr_ratio
    if optim.schedule == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay = optim.decay(steps)
    if decay == 0:
        return optim.lr
    left = (steps - 1 - step) / decay
    return floor + (optim.lr - floor) * min(1.0, max(0.0, left))

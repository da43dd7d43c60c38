"""The optimizer and its learning rate. Group optim."""

import math
from dataclasses import dataclass

LONGEST_WARMUP = 100  # steps, unless optim.warmup_steps is given


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) and its learning rate over the steps of the run."""

    lr: float = 6e-4  # the largest learning rate of the schedule
    #: cosine falls to min_lr_ratio·lr at the last step; wsd (warm-up, stable, decay; Hu et al., arXiv:2404.06395) holds
    #: lr and falls linearly over the last decay_fraction of the steps
    schedule: str = "cosine"
    warmup_steps: int | None = None  # first steps, in which lr rises linearly; null: a tenth of the steps, at most 100
    min_lr_ratio: float = 0.1  # learning rate of the last step, as a fraction of lr
    decay_fraction: float = 0.2  # last part of the steps in which wsd lowers the learning rate
    clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    beta1: float = 0.9  # decay of the first moment, per step
    beta2: float = 0.95  # decay of the second moment, per step
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # of matrices; biases and norms are never decayed

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"optim.schedule={self.schedule} must be cosine or wsd")
        for key in ("lr", "eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be positive")
        for key in ("warmup_steps", "clip", "weight_decay"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be a number of at least 0")
        for key in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be in [0, 1]")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be in [0, 1)")

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up in a schedule of that many."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return max(0, min(LONGEST_WARMUP, steps // 10, steps - self.decay(steps)))

    def decay(self, steps: int) -> int:
        """Steps of the final decay of a "wsd" schedule; 0 for "cosine", which has no separate decay."""
        if self.schedule != "wsd" or self.decay_fraction == 0:
            return 0
        return max(1, round(self.decay_fraction * steps))

    def check_steps(self, steps: int) -> None:
        """Raises ValueError if the warm-up, or warm-up and decay together, do not fit into that many steps."""
        warmup, decay = self.warmup(steps), self.decay(steps)
        advice = "give fewer warm-up steps, or null: a tenth of the steps, at most 100"
        if warmup >= steps:
            raise ValueError(f"optim.warmup_steps={warmup} must be below train.steps={steps}: {advice}")
        if warmup + decay > steps:
            raise ValueError(
                f"optim.warmup_steps={warmup} and the {decay} steps of optim.decay_fraction={self.decay_fraction} must"
                f" not overlap in train.steps={steps}: {advice}"
            )

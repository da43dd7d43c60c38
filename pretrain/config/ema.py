"""Settings of the running average of the weights. Group ema."""

from dataclasses import dataclass

AVERAGE = "ema"  # the state tensor of a parameter that holds its average; also begins its name in a checkpoint
WEIGHTS = {"last": "", "ema": f"{AVERAGE}."}  # weights in a checkpoint, and how their names begin


@dataclass
class EmaConfig:
    """Exponential moving average of all weights, kept beside them in fp32 and evaluated with them."""

    decay: float | None = None  # factor per step on what the average holds, such as 0.999; null: no running average
    every: int = 1  # steps between updates of the average; the factor of an update is then decay^every

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must be in (0, 1) (null: no running average)")
        if self.every < 1:
            raise ValueError(f"ema.every={self.every} must be at least 1")

    @property
    def on(self) -> bool:
        return self.decay is not None


def check_choice(weights: str) -> None:
    """Raises ValueError if `weights` is not a key of WEIGHTS."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights} must be {' or '.join(WEIGHTS)}")

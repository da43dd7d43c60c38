"""Settings of saves: when a run saves and which checkpoints it keeps. Group checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """Times of saves and rules for old checkpoints."""

    every: int = 500  # steps between saves; 0: only after the last step
    asynchronous: bool = True  # write the files in the background while training continues
    keep: int = 3  # keep this many of the newest checkpoints; 0: all
    keep_every: int = 0  # also keep checkpoints of steps that are multiples of this; 0: none
    keep_best: int = 0  # also keep this many checkpoints with the lowest validation loss; 0: none
    reserve_seconds: float = 60.0  # save and stop at least this many seconds before a time limit

    def __post_init__(self) -> None:
        for key in ("every", "keep", "keep_every", "keep_best", "reserve_seconds"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"checkpoint.{key}={getattr(self, key)} must not be negative")

    def check_rollback(self, margin: int) -> None:
        """Raises ValueError if the rules keep no checkpoint that is guard.margin steps old."""
        if not self.every:
            raise ValueError("guard.level=rollback needs older checkpoints: checkpoint.every=0 must be positive")
        least = 1 - (-margin // self.every)
        if 0 < self.keep < least and not self.keep_every:
            raise ValueError(
                f"guard.level=rollback needs older checkpoints: checkpoint.keep={self.keep} must be at least {least}"
                f" (or 0: all), to reach back guard.margin={margin} steps with checkpoint.every={self.every}"
            )

    def kept(self, val_losses: Mapping[int, float | None]) -> set[int]:
        """Steps of the checkpoints to keep. `val_losses`: validation loss of each step, None if not measured."""
        steps = sorted(val_losses)
        if not self.keep:
            return set(steps)
        measured = sorted((loss, step) for step, loss in val_losses.items() if loss is not None and loss == loss)
        every = {step for step in steps if self.keep_every and step % self.keep_every == 0}
        return every | set(steps[-self.keep :]) | {step for _, step in measured[: self.keep_best]}

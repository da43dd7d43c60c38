"""Settings of the guard against loss spikes. Group guard."""

from dataclasses import dataclass

LEVELS = ("off", "warn", "clip", "skip", "rollback")


@dataclass
class GuardConfig:
    """Reaction of a run to a step whose loss or gradient norm is far above those of the steps before it."""

    #: off: only a norm or loss that is not finite ends the run; warn: report a spike; clip: also limit its gradient to
    #: the median norm; skip: leave its batch out instead, also if loss or norm is not finite; rollback: as skip, and if
    #: all batches spike, return to a checkpoint from before and leave out the samples in between
    level: str = "skip"
    window: int = 128  # steps that are compared with; nothing finite is judged before there are as many
    #: spike: above the median by this many robust standard deviations (1.4826 · MAD, at least 0.02 nats; for the norm,
    #: of its log, at least 0.5: 6 of them are a factor of 20)
    threshold: float = 6.0
    #: most batches in a row that are left out; the next spike is taken as the new level, or rolls back
    patience: int = 4
    margin: int = 8  # steps before a spike whose samples a rollback also leaves out: the damage came from one of them
    max_rollbacks: int = 5  # the run ends at a spike after this many rollbacks

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"guard.level={self.level} must be one of {', '.join(LEVELS)}")
        for key, least in (("window", 8), ("patience", 1), ("margin", 1), ("max_rollbacks", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"guard.{key}={getattr(self, key)} must be at least {least}")
        if not self.threshold > 0:
            raise ValueError(f"guard.threshold={self.threshold} must be positive")

    def reaches(self, level: str) -> bool:
        """True if the guard does what `level` says: each level includes those before it."""
        return LEVELS.index(self.level) >= LEVELS.index(level)

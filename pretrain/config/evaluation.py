"""Settings of the evaluation: how often and on how much text. Group eval."""

from dataclasses import dataclass


@dataclass
class EvalConfig:
    """Validation loss and bits per byte on the validation splits."""

    every: int = 250  # steps between evaluations; 0: only after the last step
    max_windows: int = 0  # windows of each validation split to score; 0: all

    def __post_init__(self) -> None:
        for key in ("every", "max_windows"):
            if getattr(self, key) < 0:
                raise ValueError(f"eval.{key}={getattr(self, key)} must not be negative")

"""Settings of logging and of the measurements of the weights during training. Groups log and monitor."""

from dataclasses import dataclass


@dataclass
class LogConfig:
    """Scalars in RUN/metrics.jsonl, in TensorBoard and on the terminal."""

    every: int = 10  # steps between log entries; the first and the last step of each start are always logged
    tensorboard: bool = True  # also write event files for TensorBoard to the run's folder

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")


@dataclass
class MonitorConfig:
    """Measurements of the weights during training."""

    embedding_every: int = 0  # steps between measurements of the matrix: rows and both gradients; 0: never
    lens_every: int = 0  # steps between logit lens measurements on validation windows; 0: never
    lens_windows: int = 8  # validation windows per lens measurement, over all ranks

    def __post_init__(self) -> None:
        for key in ("embedding_every", "lens_every"):
            if getattr(self, key) < 0:
                raise ValueError(f"monitor.{key}={getattr(self, key)} must not be negative (0: never)")
        if self.lens_windows < 1:
            raise ValueError(f"monitor.lens_windows={self.lens_windows} must be at least 1")

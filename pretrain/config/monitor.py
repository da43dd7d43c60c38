"""Settings of what a run logs, and of what it measures about its own weights. Groups log and monitor."""

from dataclasses import dataclass


@dataclass
class LogConfig:
    """Scalars in RUN/metrics.jsonl, in TensorBoard and on the terminal."""

    every: int = 10  # steps between logged steps
    tensorboard: bool = True  # also write curves to RUN/tensorboard

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")


@dataclass
class MonitorConfig:
    """Measurements that a run makes of its own weights while it trains."""

    embedding_every: int = 0  # steps between looks at the matrix, its rows and its two gradients; 0: never
    lens_every: int = 0  # steps between measurements of what each layer would predict on validation windows; 0: never
    lens_windows: int = 8  # validation windows for the lens, over all ranks

    def __post_init__(self) -> None:
        for key in ("embedding_every", "lens_every"):
            if getattr(self, key) < 0:
                raise ValueError(f"monitor.{key}={getattr(self, key)} must not be negative (0: never)")
        if self.lens_windows < 1:
            raise ValueError(f"monitor.lens_windows={self.lens_windows} must be at least 1")

"""How often a run looks at itself."""

from dataclasses import dataclass


@dataclass
class MonitorConfig:
    """embedding: steps between looks at the matrix, its rows and the gradients of its two uses; 0: never."""

    embedding: int = 0

    def __post_init__(self) -> None:
        if self.embedding < 0:
            raise ValueError(f"monitor.embedding={self.embedding} must not be negative (0: never)")

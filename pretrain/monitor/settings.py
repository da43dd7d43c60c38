"""How often a run looks at itself."""

from dataclasses import dataclass


@dataclass
class MonitorConfig:
    """embedding: steps between looks at the matrix, its rows and the gradients of its two uses; 0: never. lens: steps
    between looks at what each layer would guess on held-out windows; 0: never. lens_windows: so many, of all ranks.
    """

    embedding: int = 0
    lens: int = 0
    lens_windows: int = 8

    def __post_init__(self) -> None:
        for key in ("embedding", "lens"):
            if getattr(self, key) < 0:
                raise ValueError(f"monitor.{key}={getattr(self, key)} must not be negative (0: never)")
        if self.lens_windows < 1:
            raise ValueError(f"monitor.lens_windows={self.lens_windows} must be at least 1")

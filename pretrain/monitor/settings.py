"""How often a run looks at itself."""

from dataclasses import dataclass


@dataclass
class MonitorConfig:
    """embedding: steps between looks at the matrix, its rows and the gradients of its two uses; 0: never. lens: steps
    between looks at what each layer would guess on a held-out batch; 0: never.
    """

    embedding: int = 0
    lens: int = 0

    def __post_init__(self) -> None:
        for key in ("embedding", "lens"):
            if getattr(self, key) < 0:
                raise ValueError(f"monitor.{key}={getattr(self, key)} must not be negative (0: never)")

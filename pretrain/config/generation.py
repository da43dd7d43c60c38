"""How a model continues a prompt, and the rules of a draw. pretrain.vocab imports it, so it imports nothing."""

import math
from dataclasses import dataclass

COLDEST = 1e-6  # of temperatures; below, logits divided by it leave the range of floats


@dataclass
class GenerateConfig:
    """Settings of `python -m pretrain.generate`."""

    run: str = ""  # folder of the run
    prompt: str = ""  # text to continue
    step: int | None = None  # step of the checkpoint; null: the newest
    tokens: int = 200  # most tokens to generate
    temperature: float = 0.8  # logits are divided by it; 0: take the likeliest token
    top_k: int | None = None  # draw from this many of the likeliest rows; null: all
    top_p: float = 0.95  # draw from the likeliest rows that together have this probability
    seed: int = 0  # the same seed gives the same text

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is missing: name the folder of a run, such as run=runs/a")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be in [0, 2^63)")
        check_sampling(self.temperature, self.top_k, self.top_p)


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises ValueError on a setting out of range."""
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be 0 (the likeliest token), or a number of at least {COLDEST}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1 (null: all rows)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")

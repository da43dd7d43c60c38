"""Settings of text generation and the rules of sampling. Imports only config: pretrain.vocab imports it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .ema import check_choice

COLDEST = 1e-6  # lowest temperature; logits divided by a lower one would overflow


@dataclass
class GenerateConfig:
    """Settings of `python -m pretrain.generate`."""

    run: str = ""  # folder of the run
    prompt: str = ""  # text to continue
    prompts: str = ""  # file of prompts, instead of prompt: one per line; .jsonl: objects with `prompt`
    batch: int = 16  # prompts of the file that are continued at once
    step: int | None = None  # step of the checkpoint; null: the newest
    weights: str = "last"  # last: the weights of the step; ema: their running average, see ema.decay
    tokens: int = 200  # largest number of tokens to generate; a text also ends at the model's context
    temperature: float = 0.8  # divides the logits; 0: always take the most likely token
    top_k: int | None = None  # sample from this many of the most likely tokens; null: all
    top_p: float = 0.95  # sample from the most likely tokens with this total probability; 1: all
    seed: int = 0  # seed of the sampling; the same seed gives the same text

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is missing: name the folder of a run, such as run=runs/a")
        check_choice(self.weights)
        if self.prompt and self.prompts:
            raise ValueError("give one of prompt=, a text, and prompts=, a file")
        for key in ("tokens", "batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be in [0, 2^63)")
        check_sampling(self.temperature, self.top_k, self.top_p)


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises ValueError if a setting is out of range."""
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be 0 (the most likely token), or a number of at least {COLDEST}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1 (null: all tokens)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")


def read_prompts(path: Path) -> list[str]:
    """Reads a file of prompts. Raises ValueError if it has none, or a line of a .jsonl is not an object with `prompt`,
    and OSError if it cannot be read.
    """
    prompts = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if path.suffix == ".jsonl" and line.strip():
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, KeyError, TypeError):
                prompts.append(None)
            if not isinstance(prompts[-1], str):
                raise ValueError(f"prompts={path}: line {number} must be an object with the text `prompt`")
        elif path.suffix != ".jsonl" and line:
            prompts.append(line)
    if not prompts:
        raise ValueError(f"prompts={path} must have at least one prompt")
    return prompts

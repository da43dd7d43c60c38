"""Where a tensor of our body lies among those of a Hugging Face model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models.gpt2 import GPT2Config
from ..models.llama import LlamaConfig

Model = GPT2Config | LlamaConfig


@dataclass(frozen=True)
class WeightMapping:
    """`ours` is `theirs`, one below the other, with so many of its rows each. transposed: theirs lie on their side."""

    ours: str
    theirs: dict[str, int]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """Models of one kind. Their names come after `prefix`, which files of a bare body lack; `embedding` is the matrix.

    tied: what a config.json that does not say means. buffers: ends of names that are not weights. model: from a
    config.json; ValueError, key and rule, where our body cannot be it. settings: the config.json, but for vocabulary
    and tie. missing: tensors that they have and our body has not, and their length; they are zero.
    """

    prefix: str
    embedding: str
    tied: bool
    buffers: tuple[str, ...]
    model: Callable[[dict[str, Any]], Model]
    settings: Callable[[Any], dict[str, Any]]
    mappings: Callable[[Any], list[WeightMapping]]
    missing: Callable[[Any], dict[str, int]]


HEAD = "lm_head.weight"


def must_be(config: dict[str, Any], key: str, *allowed: Any) -> None:
    """ValueError unless the key has one of these values, of which the first is what its absence means."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"{key}={value} must be {' or '.join(map(str, allowed))}: our body knows no other")


def need(config: dict[str, Any], *keys: str, kinds: tuple[type, ...] = (int,)) -> list[Any]:
    """The values. ValueError naming the first that is missing, or of another type."""
    for key in keys:
        if config.get(key) is None:
            raise ValueError(f"{key} is missing")
        if type(config[key]) not in kinds:
            raise ValueError(f"{key}={config[key]!r} must be a {'number' if float in kinds else 'whole number'}")
    return [config[key] for key in keys]

"""Declares what a model family tells the rest of the program. No torch: a launcher reads it before any rank starts.

Apart from the families' own files because all of them build on it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Activations:
    """Activations that a block keeps between forward and backward, in numbers per token."""

    kept: int  # what the block's backward finds
    again: int  # what the backward computes again
    gradients: int  # the most gradients of activations that the backward holds at once
    sums: int  # numbers in fp32, of the softmax and of norms
    attention: int  # width of all query heads
    formula: str  # how the plan explains it


class ModelConfig(Protocol):
    """The settings of a body: a dataclass whose fields are the keys of `model`. A family may have any further ones."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    family: str  # names the family in the registry
    layers: int  # blocks
    width: int  # D
    context: int  # most positions that the body can see

    def body(self) -> "nn.Module":
        """Builds the body; the only thing here that imports torch.

        A body has `blocks`, alike, and a last `norm`; `forward(hidden_BTD, starts_BT)` returns hidden [B, T, D];
        `initial_rows(name, seed, start, stop)` returns rows of a parameter's initial value.
        """
        ...

    def activations(self, checkpointing: str) -> Activations:
        """The footprint of one block. checkpointing: engine.activation_checkpointing."""
        ...


@dataclass(frozen=True)
class WeightMapping:
    """A tensor of our body in a Hugging Face model."""

    ours: str  # name of our tensor
    theirs: dict[str, int]  # names of their tensors, which stacked make ours, and the rows of each
    columns: int | None = None  # of ours; null: it is a vector
    transposed: bool = False  # their weight is [in, out]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of our tensor."""
        return self._with_columns(sum(self.theirs.values()))

    def their_shape(self, name: str) -> tuple[int, ...]:
        """The shape of their tensor of that name."""
        shape = self._with_columns(self.theirs[name])
        return shape[::-1] if self.transposed else shape

    def _with_columns(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.columns is None else (rows, self.columns)


@dataclass(frozen=True)
class HuggingFace:
    """How Hugging Face keeps the models of a family."""

    model_types: dict[str, str]  # values of model_type that are of this family, and the name that people know
    prefix: str  # begins their tensors' names, except in files of a bare body
    embedding: str  # name of the embedding matrix
    tied: bool  # what a config.json without tie_word_embeddings means
    buffers: tuple[str, ...]  # ends of names that are not weights
    model: Callable[[dict[str, Any]], Any]  # config.json -> our settings; ValueError if our body cannot be that model
    settings: Callable[[Any], dict[str, Any]]  # our settings -> config.json, without vocabulary and tie
    mappings: Callable[[Any], list[WeightMapping]]  # all tensors of the body
    missing: Callable[[Any], dict[str, int]] = lambda model: {}  # their tensors that ours lacks, zero, and their length


@dataclass(frozen=True)
class Family:
    """One model family. A new one is added to the tuple in `registry.py`."""

    config: type[Any]  # its ModelConfig
    hugging_face: HuggingFace
    vocab: dict[str, Any] = field(default_factory=dict)  # settings of `vocab` that its models have, such as softcap
    without_weights: frozenset[str] = frozenset()  # settings of `model` that no weight depends on
    explicit: Callable[[Any], dict[str, Any]] = asdict  # the settings, with the number that a null stands for

    @property
    def name(self) -> str:
        return self.config.family


HEAD = "lm_head.weight"


def must_be(config: dict[str, Any], key: str, *allowed: Any) -> None:
    """Raises ValueError unless the key has one of these values; a missing key means the first."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"{key}={value} must be {' or '.join(map(str, allowed))}: our body knows no other")


def need(config: dict[str, Any], *keys: str, kinds: tuple[type, ...] = (int,)) -> list[Any]:
    """The values of the keys. Raises ValueError naming the first that is missing or has another type."""
    for key in keys:
        if config.get(key) is None:
            raise ValueError(f"{key} is missing")
        if type(config[key]) not in kinds:
            raise ValueError(f"{key}={config[key]!r} must be a {'number' if float in kinds else 'whole number'}")
    return [config[key] for key in keys]


def check_positive(config: Any, whole: tuple[str, ...], real: tuple[str, ...]) -> None:
    """Raises ValueError unless the fields `whole` are at least 1 and the fields `real` positive and finite."""
    for key in whole:
        if getattr(config, key) < 1:
            raise ValueError(f"model.{key}={getattr(config, key)} must be at least 1")
    for key in real:
        if not 0 < getattr(config, key) < float("inf"):
            raise ValueError(f"model.{key}={getattr(config, key)} must be positive")

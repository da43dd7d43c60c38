"""Interface of a model family. Imports no torch: launchers read it before any rank starts.

Separate from the families' files because all of them use it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Activations:
    """Activation memory of one block, in numbers per token."""

    kept: int  # kept from forward to backward
    again: int  # recomputed in the backward
    gradients: int  # largest number of activation gradients that the backward holds at a time
    sums: int  # fp32 statistics of softmax and norms
    attention: int  # width of all query heads together
    formula: str  # explanation in the plan's output


class ModelConfig(Protocol):
    """Settings of a body: a dataclass with the keys of `model` as fields. A family may add further fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    family: str  # name in the registry
    layers: int  # blocks
    width: int  # D
    context: int  # largest number of positions

    def body(self) -> "nn.Module":
        """Builds the body. Only this method imports torch.

        A body has equal `blocks` and a final `norm`. `forward(hidden_BTD, starts_BT)` returns hidden [B, T, D].
        `initial_rows(name, seed, start, stop)` returns rows of a parameter's initial value. `stacked`, if a weight of
        the blocks is several matrices, such as queries, keys and values, has the rows of each, by the end of its name.
        """
        ...

    def activations(self, checkpointing: str) -> Activations:
        """Activation memory of one block. checkpointing: engine.activation_checkpointing."""
        ...


@dataclass(frozen=True)
class WeightMapping:
    """Mapping of one tensor of our body to tensors of a Hugging Face model."""

    ours: str  # name of our tensor
    theirs: dict[str, int]  # names of their tensors, stacked by rows to ours, with the rows of each
    columns: int | None = None  # of our tensor; None: it is a vector
    transposed: bool = False  # True: their weight is [in, out]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our tensor."""
        return self._with_columns(sum(self.theirs.values()))

    def their_shape(self, name: str) -> tuple[int, ...]:
        """Shape of their tensor of this name."""
        shape = self._with_columns(self.theirs[name])
        return shape[::-1] if self.transposed else shape

    def _with_columns(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.columns is None else (rows, self.columns)


@dataclass(frozen=True)
class HuggingFace:
    """Format of a family's models at Hugging Face."""

    model_types: dict[str, str]  # model_type in config.json to the display name
    prefix: str  # prefix of their tensor names; files of a body without head lack it
    embedding: str  # name of the embedding matrix
    tied: bool  # default of tie_word_embeddings
    buffers: tuple[str, ...]  # suffixes of tensors that are not weights
    model: Callable[[dict[str, Any]], Any]  # config.json -> our settings; raises ValueError if not supported
    settings: Callable[[Any], dict[str, Any]]  # our settings -> config.json, without vocabulary and tie
    mappings: Callable[[Any], list[WeightMapping]]  # of all tensors of the body
    missing: Callable[[Any], dict[str, int]] = lambda model: {}  # zero vectors that only they have, with length


@dataclass(frozen=True)
class Family:
    """Description of one model family. Add a new one to the tuple in `registry.py`."""

    config: type[Any]  # its ModelConfig
    hugging_face: HuggingFace
    vocab: dict[str, Any] = field(default_factory=dict)  # required settings of `vocab`, such as softcap
    without_weights: frozenset[str] = frozenset()  # settings of `model` that do not affect the weights
    explicit: Callable[[Any], dict[str, Any]] = asdict  # settings with each null resolved

    @property
    def name(self) -> str:
        return self.config.family

    def parameters(self, model: ModelConfig) -> int:
        """Number of parameters of the body."""
        return sum(math.prod(weight.shape) for weight in self.hugging_face.mappings(model))


HEAD = "lm_head.weight"


def must_be(config: dict[str, Any], key: str, *allowed: Any) -> None:
    """Raises ValueError if the key's value is not allowed. A missing key means the first of `allowed`."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise ValueError(f"{key}={value} must be {' or '.join(map(str, allowed))}: nothing else is supported")


def need(config: dict[str, Any], *keys: str, kinds: tuple[type, ...] = (int,)) -> list[Any]:
    """Returns the values of the keys. Raises ValueError for the first that is missing or has another type."""
    for key in keys:
        if config.get(key) is None:
            raise ValueError(f"{key} is missing")
        if type(config[key]) not in kinds:
            raise ValueError(f"{key}={config[key]!r} must be a {'number' if float in kinds else 'whole number'}")
    return [config[key] for key in keys]


def check_positive(config: Any, whole: tuple[str, ...], real: tuple[str, ...]) -> None:
    """Raises ValueError if a field of `whole` is below 1 or a field of `real` is not positive and finite."""
    for key in whole:
        if getattr(config, key) < 1:
            raise ValueError(f"model.{key}={getattr(config, key)} must be at least 1")
    for key in real:
        if not 0 < getattr(config, key) < float("inf"):
            raise ValueError(f"model.{key}={getattr(config, key)} must be positive")

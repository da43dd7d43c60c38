"""Which optimizer steps what. The only module that names them: engines, the vocabulary and the planner ask it."""

from ..config.optim import OptimConfig
from .adamw import AdamW
from .base import Optimizer

OF_BODY: dict[str, type[Optimizer]] = {"adamw": AdamW}  # by optim.name


def body_optimizer(optim: OptimConfig) -> type[Optimizer]:
    return OF_BODY[optim.name]


def vocab_optimizer(optim: OptimConfig) -> type[Optimizer]:
    """AdamW, whatever steps the body: rows of an embedding or a head are not a matrix that maps hidden states."""
    return AdamW

"""Which optimizer steps what. The only module that names them: engines, the vocabulary and the planner ask it."""

from ..config.optim import OptimConfig
from .adamw import AdamW
from .base import Optimizer

OF_BODY: dict[str, type[Optimizer]] = {"adamw": AdamW}  # by optim.name
#: Whatever steps the body: rows of an embedding or a head are vectors, not a map of hidden states.
VOCAB_OPTIMIZER: type[Optimizer] = AdamW


def body_optimizer(optim: OptimConfig) -> type[Optimizer]:
    """The class behind optim.name."""
    return OF_BODY[optim.name]

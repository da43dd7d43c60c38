"""Choice of the optimizers of body and vocabulary. No other module names an optimizer class."""

from ..config.optim import OptimConfig
from .adamw import AdamW
from .base import Optimizer
from .muon import Muon

OF_BODY: dict[str, type[Optimizer]] = {"adamw": AdamW, "muon": Muon}  # by optim.name
#: The same for every optimizer of the body. Rows of an embedding or a head are vectors, not maps of hidden states.
VOCAB_OPTIMIZER: type[Optimizer] = AdamW


def body_optimizer(optim: OptimConfig) -> type[Optimizer]:
    """Returns the optimizer class for optim.name."""
    return OF_BODY[optim.name]

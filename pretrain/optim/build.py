"""Which optimizer steps what. The only module that names them: engines and the vocabulary ask it."""

from ..config.optim import OptimConfig
from .adamw import AdamW
from .base import Optimizer


def body_optimizer(optim: OptimConfig) -> type[Optimizer]:
    return AdamW


def vocab_optimizer(optim: OptimConfig) -> type[Optimizer]:
    return AdamW

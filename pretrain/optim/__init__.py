"""Optimizers of the body and the matrix, the schedule, and the clip over both."""

from .base import STATE_PREFIX, Optimizer, Piece, local, saved_name
from .build import VOCAB_OPTIMIZER, body_optimizer
from .clip import apply_clip, clip_factor, global_norm, read_norm
from .schedule import lr_at, momentum_at
from .vocab import VocabOptimizer
from .width import body_factors

__all__ = [
    "STATE_PREFIX",
    "VOCAB_OPTIMIZER",
    "Optimizer",
    "Piece",
    "VocabOptimizer",
    "apply_clip",
    "body_factors",
    "body_optimizer",
    "clip_factor",
    "global_norm",
    "local",
    "lr_at",
    "momentum_at",
    "read_norm",
    "saved_name",
]

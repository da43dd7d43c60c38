"""Checkpoints: what is saved, and when it counts as saved."""

from .manager import (
    CheckpointConfig,
    CheckpointError,
    CheckpointManager,
    checkpoints,
    read_manifest,
    read_tensors,
)
from .state import ModelState, TrainState

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointManager",
    "ModelState",
    "TrainState",
    "checkpoints",
    "read_manifest",
    "read_tensors",
]

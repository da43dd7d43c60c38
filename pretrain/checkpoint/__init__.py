"""Checkpoints: what is saved, and when it counts as saved."""

from .manager import (
    CheckpointConfig,
    CheckpointError,
    CheckpointManager,
    check_files,
    checkpoints,
    read_manifest,
    read_tensors,
)
from .state import ModelState, TrainState, matrix_dtensor

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointManager",
    "ModelState",
    "TrainState",
    "check_files",
    "checkpoints",
    "matrix_dtensor",
    "read_manifest",
    "read_tensors",
]

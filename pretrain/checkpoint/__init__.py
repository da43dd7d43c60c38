"""Checkpoints: what is saved, and when it counts as saved."""

from .folder import (
    RANKS_LOCK,
    CheckpointConfig,
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    checkpoints,
    newest_manifest,
    read_manifest,
    step_of,
)
from .manager import CheckpointManager, read_tensors
from .state import ModelState, TrainState, matrix_dtensor

__all__ = [
    "RANKS_LOCK",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointManager",
    "DamagedCheckpoint",
    "ModelState",
    "TrainState",
    "check_files",
    "checkpoints",
    "matrix_dtensor",
    "newest_manifest",
    "read_manifest",
    "read_tensors",
    "step_of",
]

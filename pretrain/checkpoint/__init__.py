"""Checkpoints: what is saved, and when it counts as saved."""

from .folder import (
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    checkpoint_of,
    checkpoints,
    newest_manifest,
    read_manifest,
    step_of,
)
from .manager import CheckpointManager, read_tensors
from .reading import model_for_reading
from .rows import CheckpointRows, save_weights
from .state import HookState, ModelState, TrainState, matrix_dtensor
from .tensor_file import Streamed, write_streamed

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "CheckpointRows",
    "DamagedCheckpoint",
    "HookState",
    "ModelState",
    "Streamed",
    "TrainState",
    "check_files",
    "checkpoint_of",
    "checkpoints",
    "matrix_dtensor",
    "model_for_reading",
    "newest_manifest",
    "read_manifest",
    "read_tensors",
    "save_weights",
    "step_of",
    "write_streamed",
]

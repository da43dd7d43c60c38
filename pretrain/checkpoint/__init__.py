"""Checkpoints: saving, verifying and loading. Exports only what does not need torch; the rest is in the modules."""

from .folder import (
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    check_weights,
    checkpoint_of,
    checkpoints,
    matrices,
    newest_manifest,
    parameters,
    read_manifest,
    step_of,
)

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "check_files",
    "check_weights",
    "checkpoint_of",
    "checkpoints",
    "matrices",
    "newest_manifest",
    "parameters",
    "read_manifest",
    "step_of",
]

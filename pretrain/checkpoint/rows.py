"""Reads and writes a checkpoint by rows, in one process, without a whole tensor in memory."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from data_prep.durable import exclusive
from data_prep.progress import progress

from ..locks import RANKS_LOCK
from ..mesh import AXES
from .folder import (
    FORMAT_VERSION,
    UNFINISHED,
    CheckpointError,
    checkpoints,
    publish,
    read_manifest,
    remove_unfinished,
    set_aside_in,
)
from .tensor_file import Streamed, file_name, write_streamed


class _Part(NamedTuple):
    start: int
    stop: int
    file: Any


class CheckpointRows:
    """Reads rows of a checkpoint's tensors. Every slice in the files must be a range of rows, as our engines save."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """prefix: of the names to read, which are given without it."""
        self.folder, self.manifest, self.prefix = folder, read_manifest(folder), prefix
        saved: dict[str, list[int]] = self.manifest["tensors"]
        self.shapes = {name.removeprefix(prefix): shape for name, shape in saved.items() if name.startswith(prefix)}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows [start, stop) of a tensor. Raises CheckpointError if a row is missing in the files."""
        found, first = [], start
        for part in self._parts.get(self.prefix + name, []):
            low, high = max(first, part.start), min(stop, part.stop)
            if low == first and low < high:
                found.append(part.file.get_slice(self.prefix + name)[low - part.start : high - part.start])
                first = high
        if first < stop:
            raise CheckpointError(f"{self.folder} has no row {first} of {name}")
        return found[0] if len(found) == 1 else torch.cat(found)

    @cached_property
    def _parts(self) -> dict[str, list[_Part]]:
        """Parts of each tensor, ordered by rows."""
        parts: dict[str, list[_Part]] = {}
        for file in self.manifest["files"]:
            opened = safe_open(self.folder / file, framework="pt")
            offsets = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                start, *others = offsets[name]["saved_offsets"]
                rows, *rest = opened.get_slice(name).get_shape()
                assert not any(others) and rest == self.manifest["tensors"][name][1:], f"{name} is cut across its rows"
                parts.setdefault(name, []).append(_Part(start, start + rows, opened))
        return {name: sorted(found, key=lambda part: part.start) for name, found in parts.items()}


def save_weights(
    run: Path, tensors: list[Streamed], about: dict[str, Any], describe: Callable[[], None], title: str = "import"
) -> Path:
    """Writes the checkpoint of step 0 of a new run; returns its folder. It holds parameters only, no optimizer states.

    title: of the progress. describe: writes the run's settings; called after all weights are on the disk, before the
    checkpoint is published.
    Raises ValueError if the run has a checkpoint or another process uses it, OSError if the disk is full. After an
    error there is no checkpoint.
    """
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / RANKS_LOCK, f"run={run} is in use by another process"):
        found = checkpoints(run) + set_aside_in(run)
        if found:
            raise ValueError(f"run={run} has {found[-1].name}: choose another folder")
        remove_unfinished(run)
        final = run / "checkpoints" / "step-00000000"
        unfinished = final.with_name(UNFINISHED + final.name)
        try:
            unfinished.mkdir(parents=True)
            manifest = about | _step_0(tensors, unfinished / file_name(0), title)
            describe()
            publish(unfinished, final, manifest)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return final


def _step_0(tensors: list[Streamed], path: Path, title: str) -> dict[str, Any]:
    """Writes the tensor file. Returns the part of the manifest that does not depend on the run."""
    offsets = {tensor.name: {"saved_offsets": [0] * len(tensor.shape)} for tensor in tensors}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
    return {
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{"step": 0, "tokens": 0, "samples": {}, "val_loss": None, "rng": []},
        "mesh": dict.fromkeys(AXES, 1),
        "weights_only": True,
        "tensors": {tensor.name: list(tensor.shape) for tensor in tensors},
        "files": {path.name: write_streamed(path, tensors, metadata, partial(progress, title=title))},
    }

"""Checkpoints on disk: whole, verified, or not there at all.

    RUN/checkpoints/step-00001000/*.safetensors    one file a rank, each tensor's slices with their offsets
    RUN/checkpoints/step-00001000/manifest.json    written last: sha256 of each file, config, position, RNG

A checkpoint is written to a temporary folder, brought to the disk, and renamed. Nothing in it is a pickle.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from data_prep.durable import durable, sha256_of, sync_folder

from ..mesh import Mesh
from .state import ModelState, TrainState, restore_rng, rng_state, shapes

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MANIFEST_KEYS = ("step", "tokens", "samples", "rng", "tensors", "files")  # besides what a run says of itself
T = TypeVar("T")


@dataclass
class CheckpointConfig:
    """every: steps between saves, 0 for only the last one. keep: how many to keep, 0 for all."""

    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 0:
                raise ValueError(f"checkpoint.{key}={getattr(self, key)} must not be negative")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or does not fit; the message is one line for the user."""


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if (folder / MANIFEST_FILE).is_file())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError where it is unreadable or of another format version."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}")
    for key in MANIFEST_KEYS:
        if key not in manifest:
            raise CheckpointError(f"{path} is not a checkpoint's manifest: it has no {key}")
    return manifest


def read_tensors(folder: Path, tensors: dict[str, Any], *, alone: bool) -> None:
    """Fills the tensors in place from the checkpoint; DTensors get their slice. `alone`: no other rank takes part.

    Raises CheckpointError, naming it, where a tensor is missing or has another shape, or a file cannot be read;
    `check_files` finds the rest of what can be wrong with the files.
    """
    manifest = read_manifest(folder)
    saved = manifest["tensors"]
    for name, tensor in tensors.items():
        if name not in saved:
            raise CheckpointError(f"{folder} has no tensor {name}: it is of another model")
        if list(tensor.shape) != saved[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {saved[name]}, this model needs {list(tensor.shape)}:"
                " it is of another model"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{folder} cannot be read: {_cause(error)}") from error


def check_files(folder: Path, manifest: dict[str, Any], mine: Callable[[int], bool] = lambda _: True) -> None:
    """Compares the files with the manifest's sizes and hashes; `mine(i)` picks which ones. Raises CheckpointError."""
    for path in folder.glob("*.safetensors"):
        if path.name not in manifest["files"]:  # the reader takes every file of the folder, this one too
            raise CheckpointError(f"{path} is not in the manifest")
    for i, (name, expected) in enumerate(sorted(manifest["files"].items())):
        if not mine(i):
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, but the manifest says {expected['bytes']}")
        if sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 is not that of the manifest")


class CheckpointManager:
    """Saves and restores a run. All its methods are collective: every rank of the mesh calls them."""

    def __init__(
        self, run: Path, model: ModelState, mesh: Mesh, *, keep: int, seed: int, about: dict[str, Any]
    ) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self.model, self.mesh, self.keep, self.seed = model, mesh, keep, seed
        self.about = about  # goes into the manifest as it is: config, tokenizer

    def save(self, state: TrainState) -> Path:
        """Writes step-%08d and removes the oldest beyond `keep`. CheckpointError: nothing has changed.

        The checkpoints that stand are untouched until the new one is whole.
        """
        final = self.folder / f"step-{state.step:08d}"
        if self._as_seen_by_first_rank(lambda: (final / MANIFEST_FILE).is_file()):
            return final
        temporary = self.folder / f".tmp-{final.name}"
        try:
            self._on_first_rank(lambda: self._begin(temporary))
            tensors = self.model.tensors()
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
            files = self._together(lambda: _finish_files(temporary, self.mesh.rank))
            facts = {name: fact for mine in files for name, fact in mine.items()}
            manifest = {
                "format_version": FORMAT_VERSION,
                **asdict(state),
                **self.about,
                "mesh": {"dp": self.mesh.dp_size, "vocab": self.mesh.vocab_size},
                "rng": self._together(rng_state),
                "tensors": shapes(tensors),
                "files": facts,
            }
            self._on_first_rank(lambda: _publish(temporary, final, manifest))
        except (CheckpointError, dcp.CheckpointException) as error:
            if self.mesh.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            last = checkpoints(self.run)
            stands = f"the last good one is {last[-1]}" if last else "there is none before it"
            raise CheckpointError(f"cannot save {final}: {_cause(error)}; {stands}") from error
        self._on_first_rank(self._prune)
        return final

    def newest(self) -> Path | None:
        """The newest finished checkpoint, the same on all ranks."""
        return self._as_seen_by_first_rank(lambda: next(reversed(checkpoints(self.run)), None))

    def load(self, folder: Path) -> TrainState:
        """Verifies the files, fills model and optimizer, restores the generators. CheckpointError names the fault."""
        manifest = read_manifest(folder)
        self._together(lambda: check_files(folder, manifest, lambda i: i % self.mesh.world == self.mesh.rank))
        tensors = self.model.tensors()
        missing = set(manifest["tensors"]) - set(tensors)
        if missing:
            raise CheckpointError(f"{folder} has tensor {min(missing)}, this model has not: it is of another model")
        read_tensors(folder, tensors, alone=False)
        state = TrainState(manifest["step"], manifest["tokens"], manifest["samples"])
        self.model.load(tensors, state.step)
        restore_rng(manifest["rng"], self.mesh, self.seed, state.step)
        return state

    def _begin(self, temporary: Path) -> None:
        for stale in self.folder.glob(".tmp-*"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)

    def _prune(self) -> None:
        if self.keep:
            for old in checkpoints(self.run)[: -self.keep]:
                doomed = old.with_name(f".tmp-{old.name}")  # renamed first: half a checkpoint never has its name
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)  # the next save removes what is left

    def _as_seen_by_first_rank(self, look: Callable[[], T]) -> T:
        """On a network file system ranks may see different folders for a while, and must not part ways over it."""
        return self._together(look)[0]

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        self._together(work if self.mesh.rank == 0 else lambda: None)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Every rank's result, in rank order; if one fails, CheckpointError on all. One all-gather of objects."""
        result: T | None = None
        failure = None
        try:
            result = work()
        except (OSError, CheckpointError) as error:
            failure = str(error)
        outcomes: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(outcomes, (failure, result))
        failures = [failure for failure, _ in outcomes if failure]
        if failures:
            raise CheckpointError(failures[0])
        return [result for _, result in outcomes]


def _finish_files(temporary: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Brings the file that this rank has written to the disk; its size and hash by name."""
    facts = {}
    for path in temporary.glob(f"shard-{rank + 1:05d}-*.safetensors"):
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())
        facts[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return facts


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    strays = {path.name for path in temporary.glob("*.safetensors")} ^ manifest["files"].keys()
    if strays or not manifest["files"]:
        raise CheckpointError(f"{temporary}: no rank has written {min(strays, default='any file')}")
    with durable(temporary / MANIFEST_FILE) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    if final.exists():  # without a manifest: what a power cut left of one
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(final.parent)


def _cause(error: BaseException) -> str:
    """The innermost message: torch wraps a full disk in a report of all ranks."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return str(error)

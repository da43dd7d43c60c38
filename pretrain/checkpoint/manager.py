"""Saves and restores a run on all ranks, atomically: a checkpoint is complete and verified, or does not exist.

A checkpoint is written to a temporary folder, synced to the disk and renamed. The manifest is written last. A save runs
on its own thread and its own process group, so that its collectives never mix with training's. Forward and backward do
not change the saved tensors. Therefore they are copied during forward and backward of the next step, as in CheckFreq
(Mohan et al., FAST '21). No pickle is ever read.
"""

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ..config.checkpoint import CheckpointConfig
from ..mesh import Mesh
from ..optim import STATE_PREFIX
from .folder import (
    FORMAT_VERSION,
    UNFINISHED,
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    checkpoints,
    publish,
    read_manifest,
    refuse_to_start_over,
    remove,
    remove_unfinished,
    set_aside,
    step_of,
    superfluous,
    write_manifest,
)
from .host_copies import HostCopies
from .state import (
    HOOK_PREFIXES,
    HookStates,
    ModelState,
    Stateful,
    TrainState,
    check_shards,
    restore_rng,
    rng_state,
    shapes,
    slices,
)
from .tensor_file import Slice, file_name, write_slices

T = TypeVar("T")


def read_tensors(folder: Path, tensors: dict[str, Any], *, alone: bool) -> None:
    """Fills the tensors in place from the checkpoint; DTensors get their slice. alone: no other rank takes part.

    Raises CheckpointError if a tensor is missing or has another shape, or if a file cannot be read. Other damage of
    the files is found by `check_files`.
    """
    manifest = read_manifest(folder)
    saved = manifest["tensors"]
    for name, tensor in tensors.items():
        if name not in saved:
            raise CheckpointError(f"{folder} has no tensor {name}: it belongs to another model")
        if list(tensor.shape) != saved[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {saved[name]}, this model needs {list(tensor.shape)}:"
                " it belongs to another model"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{folder} cannot be read: {_cause(error)}") from error


class CheckpointManager:
    """Saves and restores a run. All methods except `wait_for_copy` and `failed` are collective over the mesh.

    With asynchronous saves, a host copy of this rank's slices stays in memory from the first save on.
    """

    def __init__(
        self, run: Path, model: ModelState, mesh: Mesh, config: CheckpointConfig, *, seed: int, about: dict[str, Any]
    ) -> None:
        self.run, self.folder = run, run / "checkpoints"
        self.model, self.mesh, self.config, self.seed = model, mesh, config, seed
        self.about = about  # added to the manifest: config, tokenizer
        self.hooks: Sequence[Stateful] = ()  # their state is saved and restored with the model's
        self.longest = 0.0  # duration of the longest save so far, in seconds
        self.written: tuple[Path, float] | None = None  # the newest checkpoint of this process, and its seconds
        self._group = dist.new_group(backend="gloo", timeout=mesh.timeout)
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # joined at process exit
        self._pending: Future[None] | None = None
        self._copies = HostCopies(mesh.device)
        self._taken = threading.Event()  # set: no save is copying; weights may change
        self._taken.set()
        self._val_losses: dict[Path, float | None] = {}

    def save(self, state: TrainState) -> Path:
        """Waits for the previous save, then starts to write step-%08d. Returns the path of the checkpoint.

        After the return, training may continue, but must call `wait_for_copy` before it changes a weight. The rest
        happens on the writer thread. Raises CheckpointError if this save or the previous one fails; existing
        checkpoints are then unchanged.
        """
        self.wait()
        start = time.monotonic()
        final = self.folder / f"step-{state.step:08d}"
        if self._as_seen_by_first_rank(lambda: _is_sound(final)):
            self._on_first_rank(lambda: _complete(final, state.val_loss))
            return final
        tensors, hooks = self.model.tensors(), HookStates(self.hooks)
        tensors |= hooks.tensors
        manifest = {
            "format_version": FORMAT_VERSION,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **asdict(state),
            **self.about,
            "mesh": self.mesh.sizes,
            "tensors": shapes(tensors),
            **({"hooks": hooks.numbers} if hooks.numbers else {}),
        }
        self._taken.clear()
        self._copies.mark()
        self._pending = self._writer.submit(self._write, final, manifest, list(slices(tensors)), rng_state(), start)
        if not self.config.asynchronous:
            self.wait()
        return final

    def wait_for_copy(self) -> None:
        """Waits until no save is copying this rank's weights and optimizer states. Not collective."""
        self._taken.wait()

    def failed(self) -> bool:
        """True if the background save has failed on this rank. Then all ranks must call `wait`. Not collective."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits for the background save, if any. Raises CheckpointError if it has failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the pending save and stops the writer thread. Errors of that save are dropped."""
        self._writer.shutdown()

    def restore(self, warn: Callable[[str], None]) -> tuple[TrainState, Path | None]:
        """Loads the newest intact checkpoint. Returns its state and path; a fresh state and None for a new run.

        Newer, damaged checkpoints are set aside, with a call of `warn` on rank 0. Raises CheckpointError if there are
        checkpoints but none is intact, or if the newest belongs to another model.
        """
        self._on_first_rank(lambda: remove_unfinished(self.run))
        damaged: dict[Path, str] = {}
        state, found = TrainState(), None
        for folder in reversed(self._as_seen_by_first_rank(lambda: checkpoints(self.run))):
            try:
                state, found = self.load(folder), folder
                break
            except DamagedCheckpoint as error:
                damaged[folder] = str(error)
        if found is None:
            self._on_first_rank(lambda: refuse_to_start_over(self.run, list(damaged.values())))

        def put_away() -> None:
            for folder, fault in damaged.items():
                warn(f"{fault}; resuming from {found}; the damaged one is now {set_aside(folder)}")

        self._on_first_rank(put_away)
        self.check_shards()
        return state, found

    def load(self, folder: Path) -> TrainState:
        """Verifies the files, fills model and optimizers, restores the random generators.

        Raises DamagedCheckpoint if the files are damaged, before it changes anything; CheckpointError if the checkpoint
        belongs to another model.
        """
        manifest = self._together(lambda: self._verified(folder))[self.mesh.rank]
        self.model.match(manifest["tensors"])
        saved = manifest["tensors"]
        tensors, hooks = self.model.tensors(), HookStates(self.hooks)
        tensors |= {name: tensor for name, tensor in hooks.tensors.items() if name in saved}
        missing = {name for name in saved if not name.startswith(HOOK_PREFIXES)} - set(tensors)
        if missing:
            raise CheckpointError(
                f"{folder} has tensor {min(missing)}, this model does not: it belongs to another model"
            )
        parameters = {name: tensor for name, tensor in tensors.items() if not name.startswith(STATE_PREFIX)}
        read_tensors(folder, parameters if manifest.get("weights_only") else tensors, alone=False)
        known = {item.name for item in fields(TrainState)} & manifest.keys()
        state = TrainState(**{name: manifest[name] for name in known})
        self.model.load(tensors, state.step)
        hooks.load(manifest)
        restore_rng(manifest["rng"], self.mesh, self.seed, state.step)
        return state

    def roll_back(
        self, last: int, left_out: Callable[[TrainState], list[list[int]]], rollbacks: int
    ) -> TrainState | None:
        """Loads the newest intact checkpoint up to step `last`, as `load` does, and removes all newer ones. Its
        manifest gets `left_out`, of its state, and `rollbacks`, so that a later start continues in the same way.

        Skips checkpoints without a tensor that the run now has (a second matrix, a running average, a monitor's
        counts), and imported weights, which have no optimizer state. Returns None and changes nothing if there is no
        checkpoint.
        """
        self.wait()
        needed = {*self.model.vocab.named_rows(), *HookStates(self.hooks).tensors}

        def candidates() -> list[Path]:
            return [one for one in checkpoints(self.run) if step_of(one) <= last and _has(one, needed)]

        for folder in reversed(self._as_seen_by_first_rank(candidates)):
            try:
                state = self.load(folder)
            except DamagedCheckpoint:
                continue
            state.left_out, state.rollbacks = left_out(state), rollbacks
            self._val_losses.clear()
            self._on_first_rank(lambda: _forget_after(self.run, folder, state))  # noqa: B023 - called at once
            return state
        return None

    def check_shards(self) -> None:
        """Raises CheckpointError if shards are equal or replicas differ. Reads the rows once."""
        check_shards(self._together(self.model.digests), self.mesh)

    def _verified(self, folder: Path) -> dict[str, Any]:
        """Reads the manifest and checks this rank's share of the files."""
        manifest = read_manifest(folder)
        check_files(folder, manifest, lambda i: i % self.mesh.world == self.mesh.rank)
        return manifest

    def _take(self, mine: list[Slice]) -> dict[str, tuple[int, int] | None]:
        """Replaces the tensors in `mine` by host copies if the save is asynchronous. Returns digests of the rows."""
        try:
            with self._copies.reading():
                digests = self.model.digests()
                taken = self._copies.take(mine) if self.config.asynchronous else mine
            mine[:] = taken  # only now: the copies were reading from the tensors in `mine`
            return digests
        finally:
            self._taken.set()

    def _write(
        self, final: Path, manifest: dict[str, Any], mine: list[Slice], rng: dict[str, str], start: float
    ) -> None:
        """Writes the checkpoint. A kill at any moment leaves a complete checkpoint, or none of that name."""
        unfinished = final.with_name(UNFINISHED + final.name)
        name = file_name(self.mesh.rank)
        try:
            check_shards(self._together(lambda: self._take(mine)), self.mesh)
            self._on_first_rank(lambda: self._begin(unfinished))
            facts = self._together(lambda: (rng, {name: write_slices(unfinished / name, mine)} if mine else {}))
            manifest["rng"] = [of_rank for of_rank, _ in facts]
            manifest["files"] = {name: fact for _, of_rank in facts for name, fact in of_rank.items()}
            self._on_first_rank(lambda: publish(unfinished, final, manifest))
        except CheckpointError as error:
            if self.mesh.rank == 0:
                remove_unfinished(self.run)
            raise CheckpointError(f"cannot save {final}: {error}; {self._last_good()}") from error
        try:
            self._on_first_rank(self._prune)
        except CheckpointError as error:
            raise CheckpointError(f"saved {final}, but cannot remove an older one: {error}") from error
        self.written = final, time.monotonic() - start
        self.longest = max(self.longest, self.written[1])

    def _begin(self, unfinished: Path) -> None:
        remove_unfinished(self.run)
        unfinished.mkdir(parents=True)

    def _prune(self) -> None:
        for old in superfluous(self.run, self.config, self._val_losses):
            remove(old)

    def _last_good(self) -> str:
        last = checkpoints(self.run)
        return f"the last good checkpoint is {last[-1]}" if last else "there is no earlier checkpoint"

    def _as_seen_by_first_rank(self, look: Callable[[], T]) -> T:
        """Returns rank 0's result on all ranks. Ranks may see different folders on a network disk."""
        return self._together(look)[0]

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        self._together(work if self.mesh.rank == 0 else lambda: None)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Returns the results of all ranks. If one fails, all raise CheckpointError. One all-gather of objects."""
        result: T | None = None
        failure: CheckpointError | None = None
        try:
            result = work()
        except CheckpointError as error:
            failure = error
        except (OSError, MemoryError, RuntimeError) as error:
            failure = CheckpointError(str(error) or type(error).__name__)
        outcomes: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(outcomes, (failure, result), group=self._group)
        failures = [failure for failure, _ in outcomes if failure is not None]
        if failures:
            raise max(failures, key=lambda error: not isinstance(error, DamagedCheckpoint))
        return [result for _, result in outcomes]


def _is_sound(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _has(folder: Path, tensors: set[str]) -> bool:
    """True if the checkpoint has these tensors and the optimizer's states."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return not manifest.get("weights_only") and tensors <= manifest["tensors"].keys()


def _complete(folder: Path, val_loss: float | None) -> None:
    """Adds the validation loss to a checkpoint that was saved before the evaluation at its step."""
    manifest = read_manifest(folder)
    if manifest.get("val_loss") is None and val_loss is not None:
        write_manifest(folder, manifest | {"val_loss": val_loss})


def _forget_after(run: Path, folder: Path, state: TrainState) -> None:
    """Writes into a checkpoint's manifest what a rollback has decided, then removes the newer checkpoints."""
    write_manifest(folder, read_manifest(folder) | {"left_out": state.left_out, "rollbacks": state.rollbacks})
    for newer in checkpoints(run):
        if step_of(newer) > step_of(folder):
            remove(newer)


def _cause(error: BaseException) -> str:
    """Extracts the messages of the ranks from torch's report."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return str(error)

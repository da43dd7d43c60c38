"""The folder RUN/checkpoints: lists, verifies, publishes and removes checkpoints.

    step-00001000/*.safetensors    one file per rank: slices of the tensors, with their offsets
    step-00001000/manifest.json    written last: sha256 of each file and of itself, config, position, RNG
    damaged-step-00000900/         a damaged checkpoint, renamed so that the step can be saved again
    .tmp-step-00001100/            unfinished, or being removed; never read; the next start or save removes it

Uses no process group.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.durable import durable, sha256_of, sync_folder
from data_prep.errors import nearest
from data_prep.progress import progress

from ..config.checkpoint import CheckpointConfig
from ..config.ema import AVERAGE, WEIGHTS

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
MANIFEST_KEYS = ("step", "tokens", "samples", "rng", "tensors", "files")  # the run adds more: config, tokenizer
SEAL = "sha256"  # key of the manifest's own hash
UNFINISHED, DAMAGED = ".tmp-", "damaged-"  # prefixes of the folder name


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not match the model. The message is one line for the user."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint has changed since it was written. An older one may be intact."""


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, without unfinished ones and ones set aside as damaged."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(folders, key=step_of)


def checkpoint_of(run: Path, step: int | None) -> Path:
    """Checkpoint of the step; the newest if step is None. Raises ValueError if there is none."""
    found = {step_of(folder): folder for folder in checkpoints(run)}
    if not found:
        raise ValueError(f"run={run} has no checkpoint{nearest(run, ': ')}")
    if step is not None and step not in found:
        raise ValueError(f"step={step} has no checkpoint in {run}; there are {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def matrices(manifest: dict[str, Any]) -> int:
    """Number of vocabulary matrices: 1 if tied, 2 if untied."""
    return sum(name in manifest["tensors"] for name in ("embedding.weight", "head.weight"))


def parameters(manifest: dict[str, Any]) -> tuple[int, int]:
    """Parameters of the model and, of these, in its matrices; without padding rows."""
    tensors = manifest["tensors"]
    in_matrices = matrices(manifest) * int(manifest["vocab_size"]) * int(tensors["embedding.weight"][1])
    others = ("optim.", "monitor.", f"{AVERAGE}.", "embedding.weight", "head.weight")
    body = sum(math.prod(shape) for name, shape in tensors.items() if not name.startswith(others))
    return in_matrices + body, in_matrices


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest with its own hash, atomically and synced to the disk."""
    with durable(folder / MANIFEST_FILE) as file:
        file.write(json.dumps(manifest | {SEAL: _seal(manifest)}, indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and verifies the manifest.

    Raises DamagedCheckpoint if it has changed since it was written, CheckpointError if it has another format version.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        version, seal = manifest["format_version"], manifest.pop(SEAL, None)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is not a checkpoint's manifest: {error}") from error
    if seal is not None and seal != _seal(manifest):
        raise DamagedCheckpoint(f"{path} is damaged: its sha256 does not match the one in its last line")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}")
    for key, present in {SEAL: seal is not None, **{key: key in manifest for key in MANIFEST_KEYS}}.items():
        if not present:
            raise DamagedCheckpoint(f"{path} is not a checkpoint's manifest: it has no {key}")
    return manifest


def check_weights(folder: Path, manifest: dict[str, Any], weights: str) -> None:
    """Raises ValueError if the checkpoint does not have these `WEIGHTS`."""
    if not any(name.startswith(WEIGHTS[weights]) for name in manifest["tensors"]):
        raise ValueError(
            f"weights={weights} must be last: {folder} has no running average; a run with ema.decay=0.999 saves one"
        )


def publish(unfinished: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Completes a checkpoint: writes the manifest and renames the folder. All tensor files must be written."""
    strays = {path.name for path in unfinished.glob("*.safetensors")} ^ manifest["files"].keys()
    if strays or not manifest["files"]:
        raise CheckpointError(f"{unfinished}: no rank has written {min(strays, default='any file')}")
    write_manifest(unfinished, manifest)
    if final.exists():
        set_aside(final)
    unfinished.rename(final)
    sync_folder(final.parent)


def newest_manifest(run: Path) -> dict[str, Any] | None:
    """Returns the newest manifest that is intact; None if the run has never finished a save.

    Raises DamagedCheckpoint if there are checkpoints but no intact manifest, CheckpointError as `read_manifest`.
    """
    faults = []
    for folder in reversed(checkpoints(run)):
        try:
            return read_manifest(folder)
        except DamagedCheckpoint as error:
            faults.append(str(error))
    refuse_to_start_over(run, faults)
    return None


def refuse_to_start_over(run: Path, faults: list[str]) -> None:
    """Raises DamagedCheckpoint if a run without an intact checkpoint has ever had one.

    faults: one line per damaged checkpoint.
    """
    faults = faults + [f"{folder} was set aside" for folder in set_aside_in(run)]
    if faults:
        raise DamagedCheckpoint(
            f"no checkpoint of {run} is intact, and a run never restarts from step 0 on its own: {'; '.join(faults)};"
            " restore a checkpoint from a backup, or choose another run.dir"
        )


def faults(folder: Path, manifest: dict[str, Any], mine: Callable[[int], bool] = lambda _: True) -> Iterator[str]:
    """Yields one line per difference from the manifest's files, sizes and hashes.

    mine: selects the files to check, by their number in sorted order.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest["files"]:  # torch's reader would read this file, too
            yield f"{path} is not in the manifest"
    for i, (name, expected) in enumerate(progress(sorted(manifest["files"].items()), f"verify {folder.name}")):
        if not mine(i):
            continue
        path = folder / name
        try:
            if path.stat().st_size != expected["bytes"]:
                yield f"{path}: {path.stat().st_size} bytes, but the manifest says {expected['bytes']}"
            elif sha256_of(path) != expected["sha256"]:
                yield f"{path} is damaged: its sha256 does not match the manifest"
        except FileNotFoundError:
            yield f"{path} is missing"
        except OSError as error:
            yield f"{path} cannot be read: {error}"


def check_files(folder: Path, manifest: dict[str, Any], mine: Callable[[int], bool] = lambda _: True) -> None:
    """Raises DamagedCheckpoint with the first of the `faults`, if there are any."""
    for fault in faults(folder, manifest, mine):
        raise DamagedCheckpoint(fault)


def superfluous(run: Path, rules: CheckpointConfig, known: dict[Path, float | None]) -> list[Path]:
    """Checkpoints that the rules do not keep. A checkpoint with a damaged manifest is never among them.

    known: validation losses read before. The function adds new ones, so that no manifest is read twice.
    """
    sound = []
    for folder in checkpoints(run) if rules.keep else []:
        try:
            if folder not in known:
                known[folder] = read_manifest(folder).get("val_loss")
            sound.append(folder)
        except CheckpointError:
            continue
    kept = rules.kept({step_of(folder): known[folder] for folder in sound})
    return [folder for folder in sound if step_of(folder) not in kept]


def remove(folder: Path) -> None:
    """Removes a checkpoint. Renames it first, so that a partly removed one does not look like a checkpoint."""
    doomed = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # the next save removes leftovers


def remove_unfinished(run: Path) -> None:
    """Removes leftovers of killed processes. The caller must hold the run's lock."""
    for stale in (run / "checkpoints").glob(UNFINISHED + "*"):
        shutil.rmtree(stale, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint to damaged-…; returns the new path."""
    names = (f"{DAMAGED}{folder.name}{again}" for again in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(aside)
    sync_folder(folder.parent)
    return aside


def set_aside_in(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob(DAMAGED + "*"))


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

"""RUN/checkpoints on the disk: which there are, whether they are whole, which to keep.

    step-00001000/*.safetensors    one file a rank, each tensor's slices with their offsets
    step-00001000/manifest.json    written last: sha256 of each file and of itself, config, position, RNG
    damaged-step-00000900/         was found damaged: set aside, so that the step can be saved again
    .tmp-step-00001100/            begun, or being removed: never read; the next start or save removes it

Knows no process group.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.durable import durable, sha256_of, sync_folder

from ..config.checkpoint import CheckpointConfig

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
MANIFEST_KEYS = ("step", "tokens", "samples", "rng", "tensors", "files")  # besides what a run says of itself
SEAL = "sha256"  # the manifest's own
UNFINISHED, DAMAGED = ".tmp-", "damaged-"  # before the name of a checkpoint


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or does not fit; the message is one line for the user."""


class DamagedCheckpoint(CheckpointError):
    """It is not what was once written. An older one may be whole."""


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. What is unfinished or set aside is none of them."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(folders, key=step_of)


def checkpoint_of(run: Path, step: int | None) -> Path:
    """The checkpoint of that step, or the newest. Raises ValueError if it is not there."""
    found = {step_of(folder): folder for folder in checkpoints(run)}
    if not found:
        raise ValueError(f"run={run} has no checkpoint")
    if step is not None and step not in found:
        raise ValueError(f"step={step} has no checkpoint in {run}; there are {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Brings it to the disk, whole or not at all, with a hash of itself."""
    with durable(folder / MANIFEST_FILE) as file:
        file.write(json.dumps(manifest | {SEAL: _seal(manifest)}, indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises DamagedCheckpoint if it is not as it was written, CheckpointError if it has another format version."""
    path = folder / MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        version, seal = manifest["format_version"], manifest.pop(SEAL, None)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is not a checkpoint's manifest: {error}") from error
    if seal is not None and seal != _seal(manifest):
        raise DamagedCheckpoint(f"{path} is damaged: its sha256 is not the one in its last line")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}")
    for key, present in {SEAL: seal is not None, **{key: key in manifest for key in MANIFEST_KEYS}}.items():
        if not present:
            raise DamagedCheckpoint(f"{path} is not a checkpoint's manifest: it has no {key}")
    return manifest


def publish(unfinished: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Gives a checkpoint whose files are there its manifest and its name."""
    strays = {path.name for path in unfinished.glob("*.safetensors")} ^ manifest["files"].keys()
    if strays or not manifest["files"]:
        raise CheckpointError(f"{unfinished}: no rank has written {min(strays, default='any file')}")
    write_manifest(unfinished, manifest)
    if final.exists():
        set_aside(final)
    unfinished.rename(final)
    sync_folder(final.parent)


def newest_manifest(run: Path) -> dict[str, Any] | None:
    """Manifest of the newest checkpoint that has a sound one; None for a run that has never finished a save.

    Raises DamagedCheckpoint if there are checkpoints but none is sound, CheckpointError as `read_manifest`.
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
    """For a run without a whole checkpoint: DamagedCheckpoint, unless it has never had one."""
    faults = faults + [f"{folder} was set aside" for folder in set_aside_in(run)]
    if faults:
        raise DamagedCheckpoint(
            f"no checkpoint of {run} is whole, and it does not start over by itself: {'; '.join(faults)};"
            " bring one back, or choose another run.dir"
        )


def faults(folder: Path, manifest: dict[str, Any], mine: Callable[[int], bool] = lambda _: True) -> Iterator[str]:
    """Yields what differs from the manifest's files, sizes and hashes, a line each; `mine(i)` picks which files."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest["files"]:  # the reader takes every file of the folder, this one too
            yield f"{path} is not in the manifest"
    for i, (name, expected) in enumerate(sorted(manifest["files"].items())):
        if not mine(i):
            continue
        path = folder / name
        try:
            if path.stat().st_size != expected["bytes"]:
                yield f"{path}: {path.stat().st_size} bytes, but the manifest says {expected['bytes']}"
            elif sha256_of(path) != expected["sha256"]:
                yield f"{path} is damaged: its sha256 is not that of the manifest"
        except FileNotFoundError:
            yield f"{path} is missing"
        except OSError as error:
            yield f"{path} cannot be read: {error}"


def check_files(folder: Path, manifest: dict[str, Any], mine: Callable[[int], bool] = lambda _: True) -> None:
    """DamagedCheckpoint with the first of the `faults`."""
    for fault in faults(folder, manifest, mine):
        raise DamagedCheckpoint(fault)


def superfluous(run: Path, rules: CheckpointConfig, known: dict[Path, float | None]) -> list[Path]:
    """Checkpoints that the rules do not keep. One whose manifest is not sound is never among them.

    `known`: validation losses that were read before; filled in, so that no manifest is read twice.
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
    """Half a checkpoint never has a checkpoint's name: it is renamed first."""
    doomed = folder.with_name(UNFINISHED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # the next save removes what is left


def remove_unfinished(run: Path) -> None:
    """Removes what killed processes have left behind. For the holder of the lock alone."""
    for stale in (run / "checkpoints").glob(UNFINISHED + "*"):
        shutil.rmtree(stale, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint to damaged-…, and returns where it is."""
    names = (f"{DAMAGED}{folder.name}{again}" for again in ("", *(f"-{i}" for i in range(2, 1000))))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(aside)
    sync_folder(folder.parent)
    return aside


def set_aside_in(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob(DAMAGED + "*"))


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

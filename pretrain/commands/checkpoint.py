"""Lists, verifies, prunes and averages the checkpoints of a run: `python -m pretrain.checkpoint --help`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import terminal
from data_prep.arguments import count_of, key_values
from data_prep.command import arguments_or, one_line
from data_prep.durable import check_new, exclusive
from data_prep.errors import nearest

from ..checkpoint.choice import chosen_steps, factors_of
from ..checkpoint.folder import (
    CheckpointError,
    checkpoints,
    faults,
    newest_manifest,
    read_manifest,
    remove,
    remove_unfinished,
    set_aside_in,
    step_of,
    superfluous,
)
from ..config.checkpoint import CheckpointConfig
from ..locks import RANKS_LOCK

HELP = """Lists, verifies, prunes and averages the checkpoints of a run.

  python -m pretrain.checkpoint list   run=runs/a             step, date, size, samples, validation loss, ranks, engine
  python -m pretrain.checkpoint verify run=runs/a             checks each file's sha256; exits with 1 if one is damaged
  python -m pretrain.checkpoint verify run=runs/a step=500    only that checkpoint
  python -m pretrain.checkpoint prune  run=runs/a             removes what the run's settings do not keep
  python -m pretrain.checkpoint prune  run=runs/a keep=2      keeps the newest two; likewise keep_every, keep_best
  python -m pretrain.checkpoint average run=runs/a steps=800..1000 out=runs/averaged
  python -m pretrain.checkpoint average run=runs/a steps=[600,800,1000] weights=linear out=runs/averaged

prune is refused while the run is training. It keeps damaged checkpoints and folders named damaged-….

average writes a new run: its step 0 has the mean of the weights, and no optimizer state. generate, lens, export and a
training (resume=OUT) read it. It needs the memory of some rows, reads each file twice, and never overwrites.
"""
KEYS = {
    "run": "folder of the run",
    "step": "list, verify: only the checkpoint of this step; default: all",
    "steps": "average: a..b, the checkpoints from step a to step b; or a list of steps, such as [600,800,1000]",
    "weights": "average: uniform (default); linear: 1, 2, 3, …, the latest counts most; or a number per checkpoint",
    "out": "average: folder of the run to write; it must be new",
    "keep": "prune: newest checkpoints to keep, instead of checkpoint.keep",
    "keep_every": "prune: also keep multiples of this step, instead of checkpoint.keep_every",
    "keep_best": "prune: also keep this many with the lowest validation loss, instead of checkpoint.keep_best",
}
OF_AVERAGE = ("steps", "weights", "out")
RULES = ("keep", "keep_every", "keep_best")


@dataclass
class Settings:
    """Arguments of the command. step: of the checkpoint, None for all. rules: replace the run's own. mean: keys of
    average.
    """

    run: Path
    step: int | None
    rules: dict[str, int]
    mean: dict[str, str]


def main() -> None:
    """Runs the command. Exits with 0, with 1 if a checkpoint is damaged, or with 2 and one line if it is wrong."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP)
        if arguments[0] not in COMMANDS:
            raise ValueError(f"{arguments[0]} must be one of {', '.join(COMMANDS)}; see --help")
        sys.exit(COMMANDS[arguments[0]](_settings(arguments[0], arguments[1:])))


def show(settings: Settings) -> int:
    """Prints a line per checkpoint, oldest first."""
    terminal.product()
    rows = [["step", "date", "MiB", "samples", "val loss", "ranks", "engine"]]
    for folder in _chosen(settings):
        try:
            rows.append(_row(step_of(folder), read_manifest(folder)))
        except CheckpointError as error:
            rows.append([f"{step_of(folder):,}", str(error)])
    widths = [max(len(row[i]) for row in rows if len(row) == len(rows[0])) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)))
    for aside in set_aside_in(settings.run):
        print(f"set aside: {aside}")
    return 0


def _row(step: int, manifest: dict[str, Any]) -> list[str]:
    size = sum(file["bytes"] for file in manifest["files"].values())
    loss, mesh = manifest.get("val_loss"), manifest.get("mesh", {})
    return [
        f"{step:,}",
        manifest.get("date", ""),
        f"{size / 2**20:,.1f}",
        f"{sum(manifest['samples'].values()):,}",
        "" if loss is None else f"{loss:.4f}",
        f"{mesh.get('dp', '?')} dp × {mesh.get('vocab', '?')} vocab",
        manifest.get("config", {}).get("engine", {}).get("name", ""),
    ]


def verify(settings: Settings) -> int:
    """Prints a line per checkpoint, and one per fault to stderr."""
    terminal.product()
    damaged = 0
    for folder in _chosen(settings):
        try:
            manifest = read_manifest(folder)
            found = list(faults(folder, manifest))
        except CheckpointError as error:
            found = [str(error)]
        for fault in found:
            print(fault, file=sys.stderr)
        print(f"{folder}: {f'damaged, {len(found)} fault(s)' if found else 'whole'}", flush=True)
        damaged += bool(found)
    return 1 if damaged else 0


def prune(settings: Settings) -> int:
    """Removes what the rules do not keep, and files left by killed processes."""
    if settings.step is not None:
        raise ValueError("step must not be given to prune; give keep=, keep_every= or keep_best=")
    folders = _chosen(settings)
    with exclusive(
        settings.run / RANKS_LOCK, f"run={settings.run} is in use by another process; a training prunes by itself"
    ):
        saved = (newest_manifest(settings.run) or {}).get("config", {}).get("checkpoint", {})
        rules = CheckpointConfig(**{key: saved[key] for key in RULES if key in saved} | settings.rules)
        remove_unfinished(settings.run)
        doomed = superfluous(settings.run, rules, known={})
        for folder in doomed:
            remove(folder)
            print(f"removed {folder}")
    print(f"{len(folders) - len(doomed)} checkpoints kept")
    return 0


def average(settings: Settings) -> int:
    """Writes the average of some checkpoints as a new run, and prints where it is."""
    if settings.step is not None or settings.rules:
        raise ValueError(f"{next(iter(settings.rules), 'step')} must not be given to average; give steps= and out=")
    for key in ("steps", "out"):
        if not settings.mean.get(key):
            raise ValueError(f"{key} is missing; see --help")
    out = Path(settings.mean["out"])
    check_new(out)
    chosen = chosen_steps(settings.mean["steps"], _chosen(settings))
    factors = factors_of(settings.mean.get("weights", "uniform"), len(chosen))
    terminal.product()
    from .average import write_average  # needs torch

    print(write_average(chosen, factors, settings.run, out), flush=True)
    return 0


COMMANDS: dict[str, Callable[[Settings], int]] = {"list": show, "verify": verify, "prune": prune, "average": average}


def _settings(command: str, arguments: list[str]) -> Settings:
    given = key_values(arguments, KEYS, f"{'=, '.join(KEYS)}=")
    if not given.get("run"):
        raise ValueError("run is missing; give the folder of a run, such as run=runs/a")
    mean = {key: given[key] for key in OF_AVERAGE if key in given}
    if mean and command != "average":
        raise ValueError(f"{min(mean)} must not be given to {command}; it is a key of average")
    numbers = {key: count_of(key, given[key]) for key in ("step", *RULES) if key in given}
    return Settings(Path(given["run"]), numbers.pop("step", None), numbers, mean)


def _chosen(settings: Settings) -> list[Path]:
    """Returns the folders of the chosen checkpoints. Raises ValueError if there are none."""
    found = checkpoints(settings.run)
    if not found:
        raise ValueError(f"run={settings.run} has no checkpoint{nearest(settings.run, ': ')}")
    chosen = [folder for folder in found if settings.step in (None, step_of(folder))]
    if not chosen:
        raise ValueError(
            f"step={settings.step} has no checkpoint; there are {', '.join(str(step_of(f)) for f in found)}"
        )
    return chosen


if __name__ == "__main__":
    main()

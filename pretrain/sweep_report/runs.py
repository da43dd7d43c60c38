"""Finds the runs below a folder and reads them: settings, logged steps, number of parameters. Needs no torch."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

from data_prep.errors import nearest

from ..changes import settings_of
from ..checkpoint import CheckpointError, newest_manifest, parameters
from ..config.job import CONFIG_FILE
from ..metrics_file import METRICS_FILE, logged

Curve = list[tuple[float, float]]  # tokens seen and value


@dataclass(frozen=True)
class SweepRun:
    """A run that has logged a step."""

    name: str  # its path below the folder of the report
    settings: dict[str, Any]  # by their dotted keys
    lines: list[dict[str, Any]]  # of metrics.jsonl
    parameters: int | None  # of the model, matrix included; None without a checkpoint

    @property
    def step(self) -> int:
        return int(self.lines[-1]["step"])

    @property
    def steps(self) -> int:
        """Steps of the whole schedule."""
        return int(self.settings["train.steps"])

    @property
    def complete(self) -> bool:
        """True at the end of the schedule: only then has the learning rate decayed."""
        return self.step >= self.steps

    @property
    def ended(self) -> bool:
        """True if the run is where its settings stop it."""
        stop_after = self.settings.get("train.stop_after")
        return self.step >= (self.steps if stop_after is None else min(self.steps, stop_after))

    @property
    def state(self) -> str:
        if self.complete:
            return "finished"
        return "at train.stop_after" if self.ended else f"step {self.step:,} of {self.steps:,}"

    def curve(self, key: str) -> Curve:
        """Tokens seen and value of each line that has the value as a finite number."""
        return [
            (line["tokens"], line[key])
            for line in self.lines
            if isinstance(line.get(key), int | float) and math.isfinite(line[key]) and "tokens" in line
        ]

    def last(self, key: str) -> float | None:
        return next((value for _, value in reversed(self.curve(key))), None)

    @cached_property
    def tokens(self) -> float:
        """Tokens seen up to the last step."""
        return max((tokens for tokens, _ in self.curve("loss")), default=0)

    @cached_property
    def training_loss(self) -> float | None:
        """Mean over the last tenth of the log: one batch says little."""
        values = [value for _, value in self.curve("loss")]
        return mean(values[-max(1, len(values) // 10) :]) if values else None

    @property
    def speed(self) -> float | None:
        """Median tokens per second."""
        return median([value for _, value in self.curve("tokens_per_s")] or [math.nan])


def read_runs(folder: Path) -> tuple[list[SweepRun], list[str]]:
    """Returns the runs below the folder by name, and the names of those that have logged nothing.

    Raises ValueError if the folder has no run, or if a file of a run is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"runs={folder} must be a folder with runs in it{nearest(folder, ': ')}")
    found, silent = [], []
    for place in sorted(_folders(folder)):
        name = str(place.relative_to(folder)) if place != folder else place.name
        lines = [line for line in logged(place) if "step" in line]
        if lines:
            found.append(SweepRun(name, _settings(place), lines, _parameters(place)))
        else:
            silent.append(name)
    if not found:
        said = f"the {len(silent)} below it have logged nothing yet" if silent else f"no {CONFIG_FILE} is below it"
        raise ValueError(f"runs={folder} has no run with logged steps: {said}; train some, for example by --multirun")
    return found, silent


def _folders(folder: Path) -> Iterator[Path]:
    """Yields each folder that holds the settings of a run."""
    for place, below, files in os.walk(folder):
        if CONFIG_FILE in files and (METRICS_FILE in files or "run.dir" in settings_of(Path(place))):
            yield Path(place)
            below[:] = below if Path(place) == folder else []


def _settings(run: Path) -> dict[str, Any]:
    found = settings_of(run)
    if not isinstance(found.get("train.steps"), int):
        raise ValueError(f"{run / CONFIG_FILE} is damaged: it must hold the settings of a run; move the folder away")
    return found


def _parameters(run: Path) -> int | None:
    with suppress(CheckpointError, KeyError):  # a run without an intact checkpoint is still shown
        manifest = newest_manifest(run)
        return None if manifest is None else parameters(manifest)[0]
    return None

"""Reads a run from the disk: the newest checkpoint's manifest, the metrics, the tokenizer."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from data_prep.errors import DataError, nearest
from data_prep.stats import NO_TOKEN, shown
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer

from ..checkpoint import matrices, newest_manifest, parameters
from ..metrics_file import logged

Point = tuple[float, float]


@dataclass
class ReportRun:
    """A run's folder on the disk. Raises ValueError if it is not a run, has no checkpoint, or is not of this `kind`:
    the newest checkpoint of a tied run has one matrix, that of an untied run two.
    """

    kind: str
    folder: Path

    def __post_init__(self) -> None:
        manifest = newest_manifest(self.folder)
        if manifest is None:
            raise ValueError(f"{self.kind}={self.folder} has no checkpoint: is it a run?{nearest(self.folder, ' ')}")
        self.manifest = manifest
        if self.matrices != (1 if self.kind == "tied" else 2):
            found = "1 matrix" if self.matrices == 1 else f"{self.matrices} matrices"
            newest = f"its newest checkpoint, step {manifest['step']}"
            raise ValueError(f"{self.kind}={self.folder} has {found} in {newest}: it is not {self.kind}")
        if not self.lines:
            raise ValueError(f"{self.kind}={self.folder} has logged nothing in metrics.jsonl")

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl. Raises ValueError if one is damaged."""
        return logged(self.folder)

    @property
    def matrices(self) -> int:
        return matrices(self.manifest)

    @property
    def in_matrices(self) -> int:
        return parameters(self.manifest)[1]

    @property
    def parameters(self) -> int:
        return parameters(self.manifest)[0]

    def measured(self, key: str) -> list[dict[str, Any]]:
        """The lines that have this key as a finite number."""
        return [
            line
            for line in self.lines
            if isinstance(line.get(key), int | float) and math.isfinite(line[key]) and "tokens" in line
        ]

    def points(self, key: str) -> list[Point]:
        """Pairs of tokens seen and value, for each line that has the value."""
        return [(line["tokens"], line[key]) for line in self.measured(key)]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.points(key)]

    def last(self, key: str) -> float | None:
        values = self.values(key)
        return values[-1] if values else None

    def recent(self, key: str) -> float | None:
        """Mean over the last tenth of the log: one batch says little."""
        values = self.values(key)
        return mean(values[-max(1, len(values) // 10) :]) if values else None

    @cached_property
    def last_measures(self) -> dict[str, Any]:
        """The last line with measures of the rows; empty if there is none."""
        return next((line for line in reversed(self.lines) if "grad_output" in line), {})

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        try:
            return Tokenizer.load(self.folder / TOKENIZER_FOLDER)
        except (DataError, OSError, ValueError):
            return None

    def text(self, row: int) -> str:
        """Id of the row, and its token if the run has a tokenizer."""
        token = NO_TOKEN if self.tokenizer is None else shown(row, self.tokenizer)
        return f"{row}" if token == NO_TOKEN else f"{row} {token}"

"""Reads RUN/metrics.jsonl. Not part of monitor/metrics.py, which writes it and needs torch and TensorBoard."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"  # in the run's folder: one object per logged step


def logged(run: Path) -> list[dict[str, Any]]:
    """Returns the lines, without a last one cut short by a kill; none without the file.

    Raises ValueError if another line is damaged.
    """
    path = run / METRICS_FILE
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged: {error}; delete the line") from error
    return found

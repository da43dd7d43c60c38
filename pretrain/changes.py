"""Differences between the settings of a checkpoint and of the run that resumes it.

Not part of compose.py, because launchers use it without torch, even while a job ends.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data_prep.columns import aligned
from data_prep.durable import durable
from data_prep.renamed import RENAMED

from .config.job import CONFIG_FILE

MANIFEST = "manifest.json"
Change = dict[str, Any]  # key, was, is
NOT_COMPARED = (  # settings that cannot change a loss
    *("log.", "checkpoint.", "engine.", "monitor.", "data.prefetch", "data.cache"),
    *("train.stop_after", "train.time_limit", "train.hang_timeout"),
)
PATHS = ("data.", "init_from", "decay_from")  # a launcher may have made these absolute


def keep_older(path: Path, text: str) -> None:
    """Copies a run's config.yaml to config-0001.yaml, or the next free number, if `text` is about to change it."""
    try:
        older = path.read_bytes()
    except FileNotFoundError:
        return
    if older == text.encode():
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}-{number:04d}{path.suffix}")).exists():
        number += 1
    with durable(kept) as file:
        file.write(older)


def settings_changed(run: Path, checkpoint: Path | None) -> list[Change]:
    """Returns the settings of RUN/config.yaml that differ from the checkpoint's. Empty without a checkpoint, and if it
    holds imported weights, because no step was trained with its settings.
    """
    if checkpoint is None:
        return []
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        now = yaml.safe_load((run / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return []  # the ranks will report the error
    return [] if manifest.get("weights_only") else list(_changes(dict(_flat(manifest["config"])), dict(_flat(now))))


def settings_of(run: Path) -> dict[str, Any]:
    """All settings of RUN/config.yaml by their dotted keys; none if it cannot be read."""
    try:
        return dict(_flat(yaml.safe_load((run / CONFIG_FILE).read_bytes())))
    except (OSError, AttributeError, yaml.YAMLError):
        return {}


def table(changes: list[Change]) -> list[str]:
    """Formats lines of text in three columns."""
    rows = [
        ("setting", "was", "is"),
        *((change["key"], text(change["was"]), text(change["is"])) for change in changes),
    ]
    return aligned(rows, left=(0, 1, 2))


def markdown(changes: list[Change]) -> str:
    """Formats a table for TensorBoard."""
    rows = ["| setting | was | is |", "| --- | --- | --- |"]
    rows += [f"| {change['key']} | {text(change['was'])} | {text(change['is'])} |" for change in changes]
    return "\n".join(rows)


def _changes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    """Compares only keys that both have: a newer key was at its default, and each engine has its own keys."""
    for key in sorted((was.keys() & now.keys()) - {"run.dir"}):
        if was[key] != now[key] and not (key.startswith(PATHS) and _whole(was[key]) == _whole(now[key])):
            yield {"key": key, "was": was[key], "is": now[key]}


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield RENAMED.get(f"{prefix}{key}", f"{prefix}{key}"), value


def _whole(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    scheme = "hf:" if value.startswith("hf:") else ""
    return scheme + os.path.abspath(value.removeprefix(scheme))


def text(value: Any) -> str:
    """The value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

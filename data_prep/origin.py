"""Finds out which preset, recipe or cluster file set a value that an error names.

Apart from mistakes.py, which words Hydra's own errors: this is for errors of our rules, after composing.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from data_prep.mistakes import file_of

SETTING = re.compile(r"(?<![\w.])([a-z_]+(?:\.\w+)+)=([^\s;,:]+)")
_chosen: dict[str, str] = {}  # group to option, of the command's last composition
_typed: set[str] = set()  # keys on the command line


def remember(choices: dict[str, Any], overrides: Iterable[str]) -> None:
    """Takes the options that Hydra chose, and the overrides of the command line."""
    _chosen.clear()
    _chosen.update({group: str(name) for group, name in choices.items() if name and not group.startswith("hydra")})
    _typed.clear()
    _typed.update(override.lstrip("+~").partition("=")[0] for override in overrides)


def origins(message: str) -> str:
    """Names the files of conf/ that set the values in a message, as in "; recipe=gpt2_124m sets train.precision"."""
    sources = {f"{group}={name}": _values(file_of(f"{group}/{name}"), group) for group, name in _chosen.items()}
    resumed = {"resume", "decay_from"} & _typed
    found: dict[str, str] = {}  # key to source
    for key, value in SETTING.findall(message):
        for source, values in sources.items():
            if not resumed and key not in _typed and key in values and _text(values[key]) == value:
                found[key] = source  # the last file wins, as in Hydra: a recipe comes after a model
    of_source = {source: " and ".join(key for key in found if found[key] == source) for source in found.values()}
    return "".join(f"; {source} sets {keys}" for source, keys in of_source.items())


def _values(path: Path, group: str) -> dict[str, Any]:
    """Full keys and values of a file of conf/, with those of the files that it builds on."""
    if not path.is_file():
        return {}
    text = path.read_text()
    content = yaml.safe_load(text) or {}
    found: dict[str, Any] = {}
    for entry in content.pop("defaults", []):
        name, _, package = str(entry).partition("@") if isinstance(entry, str) else ("", "", "")
        if name.startswith("/"):
            found |= _values(file_of(name[1:]), package.removeprefix("_global_").lstrip("."))
        elif name and name != "_self_":
            found |= _values(file_of(f"{group}/{name}"), group)
    return found | _flat(content, "" if "@package _global_" in text else group)


def _flat(content: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}.{key}".lstrip("."))
    return found


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

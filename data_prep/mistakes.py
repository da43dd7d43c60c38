"""Turns the errors of Hydra, OmegaConf and YAML into one-line messages about a command line or a YAML file.

command.py decides which errors are the user's mistakes; this module only words them.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from data_prep.errors import headline
from data_prep.overrides import settings_known
from data_prep.renamed import RENAMED

HERE = Path(__file__).resolve().parent
INSTALLED = (HERE / "conf").is_dir()  # True in an installed wheel, False in a checkout
CONF = HERE / "conf" if INSTALLED else HERE.parent / "conf"
UNCONVERTED = re.compile(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", re.DOTALL)
KINDS = {"float": "a number", "integer": "a whole number", "int": "a whole number"}
KINDS |= {"boolean": "true or false", "bool": "true or false"}
COMPOSING = re.compile(r"In '([^']*)': (?:\w+ raised while composing config:|(.*))", re.DOTALL)


def mistake(error: BaseException) -> str:
    """The message: key, value and rule; for a mistake in a file also its name."""
    if isinstance(error, yaml.MarkedYAMLError):
        return _of_yaml(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override}: {headline(error)}; put the value in quotes: key='\"value\"'"
    if isinstance(error, MissingConfigException):
        return _of_option(error)
    cause = error.__cause__ or error.__context__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return _of_composing(str(error), cause)
    return _with_files(_of_override(str(error), error))


def _of_yaml(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{_shown(Path(mark.name))}:{mark.line + 1}:{mark.column + 1}: " if mark else ""
    tab = "; indent with spaces, not with tabs" if "\\t" in str(error.problem) else ""
    return f"{place}{error.problem or error.context}{tab}; the keys of one level begin in the same column"


def _of_option(error: MissingConfigException) -> str:
    missing, options = error.missing_cfg_file or "", list(error.options or [])
    group, _, name = missing.rpartition("/")
    options = options or (_options(group) if group else [])
    typed = [word.lstrip("+").partition("=") for word in sys.argv[1:]]
    if options and any(key == group and value.strip("'\"") == name for key, _, value in typed):
        return f"{group}={name} must be one of {', '.join(options)}{_nearest(name, options)}"
    return f"{_with_files(headline(error)).rstrip('.')}{_nearest(name, options)}{_there_are(options)}"


def _options(group: str) -> list[str]:
    below: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        below = below.get(part, {}) if isinstance(below, dict) else {}
    stored = [name.removesuffix(".yaml") for name, node in below.items() if not isinstance(node, dict)]
    return sorted({*stored, *(path.stem for folder in folders() for path in (folder / group).glob("*.yaml"))})


def _of_composing(message: str, cause: OmegaConfBaseException) -> str:
    """The message for an error while composing: the file or the override, and the mistake."""
    found = COMPOSING.match(message)
    if found is None:
        return _of_override(message, cause)
    path = file_of(found[1])
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    at = [n for n, line in enumerate(lines, 1) if re.match(rf"\s*['\"]?{re.escape(str(cause.key))}['\"]?\s*:", line)]
    place = f"{_shown(path)}{f':{at[0]}' if at else ''}"
    group = found[1].partition("/")[0]
    kind = cause.object_type
    if is_dataclass(kind) and kind not in map(OmegaConf.get_type, _bases(group).values()) and _bases(group):
        return f"{place}: {needs_base(group)}"
    return f"{place}: {said(str(cause.full_key or cause.key), cause)}"


def _of_override(message: str, error: BaseException) -> str:
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error
    first_line = message.strip().splitlines()[0] if message.strip() else headline(error)
    override = re.match(r"(?:Error merging override|Could not override) '?(.+?)'?(?:\.|$|: )", first_line)
    if first_line.startswith("Ambiguous value for argument"):
        setting = first_line.partition("'")[2].rstrip("'")
        key, _, value = setting.partition("=")
        sweep = "a sweep is launch/local.py or launch/slurm.py with --multirun"
        return f"{setting} is several values: give one, or a list as {key}=[{value}]; {sweep}"
    if "No match in the defaults list" in first_line:
        append = re.search(r"To append to your default list use (.*)", message)
        return first_line + (f" To add it: {append[1]}" if append else "")
    if isinstance(cause, OmegaConfBaseException):
        key = override[1].lstrip("+~") if override and override[1] != cause.full_key else ""
        return said(str(cause.full_key or key.partition("=")[0]), cause)
    return first_line


def said(key: str, error: OmegaConfBaseException) -> str:
    """The message for one of OmegaConf's errors: key, value and rule."""
    first_line = str(error.msg or headline(error)).strip().splitlines()[0]
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and "not " in first_line:
        names = _names(error)
        return unknown(key, names)
    if found := UNCONVERTED.search(first_line):
        return f"{key}={found[1]} must be {KINDS.get(found[2].lower(), f'of type {found[2]}')}"
    if "is not Optional" in first_line or "Incompatible value 'None'" in first_line:
        return f"{key}=null must be a value: null is not allowed here"
    if "is not a ListConfig" in first_line:
        return f"{key} must be a list, for example [a, b]"
    if "does not support deletion" in first_line:
        return f"{key} cannot be removed: give it a value"
    if first_line.startswith("Cannot assign"):
        return f"{key} must be values by names, for example {{a: x, b: y}}"
    return f"{key}: {first_line}" if key and key not in first_line else first_line


def _names(error: OmegaConfBaseException) -> list[str]:
    if is_dataclass(error.object_type):
        return [item.name for item in fields(error.object_type)]
    parent = error.parent_node
    return [str(key) for key in parent if key != "hydra"] if isinstance(parent, DictConfig) else []


def unknown(key: str, names: Sequence[str]) -> str:
    """The message for an unknown key: the nearest name, the command that has it, and the keys that exist."""
    if key in RENAMED:
        return f"{key} is now called {RENAMED[key]}"
    *above, leaf = key.split(".")
    known = [name for name in settings_known() if not name.startswith("cluster.") or "cluster" in names]
    bases = _bases(above[0] if len(above) == 1 else "")
    having = [name.split("@")[0] for name, base in bases.items() if leaf in set(base)]  # also fields without a default
    if having:
        return f"unknown key {key}: {' and '.join(f'{above[0]}={name}' for name in having)} has it{_there_are(names)}"
    same = [name for name in known if name.split(".")[-1] == leaf and name != key]
    near = _nearest(leaf, names, ".".join(above)) if not same or above else ""
    if same and not near:
        near = f"; did you mean {' or '.join(same[:3])}?"
    if not near:
        leaves = {name.split(".")[-1]: name for name in known if "." in name}
        near = "".join(f"; did you mean {leaves[found]}?" for found in get_close_matches(leaf, leaves, 1, cutoff=0.7))
    others = [] if above else [path.stem for path in sorted(CONF.glob("*.yaml")) if _has_key(path, key)]
    others += ["plan", "slurm"] * (key == "cluster")
    where = f"; it is for {' and '.join(f'launch/{name}.py' for name in others)}" if others else ""
    return f"unknown key {key}{where or near}{_there_are(names)}"


def _has_key(path: Path, key: str) -> bool:
    return re.search(rf"^{re.escape(key)}:", path.read_text(), re.MULTILINE) is not None


def _nearest(name: str, names: Iterable[str], above: str = "") -> str:
    near = get_close_matches(name, list(names), 1)
    return f"; did you mean {above}{'.' * bool(above)}{near[0]}?" if near else ""


def _there_are(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"; there are {listed}" if listed else ""


def _bases(group: str) -> dict[str, Any]:
    """The schemas of a group, by the names that a file's defaults use. A file must choose one of them."""
    options = ConfigStore.instance().repo.get(group, {})
    found: dict[str, Any] = {}
    for name, option in options.items() if isinstance(options, dict) else ():
        if isinstance(option, dict):
            if name != "settings":  # part of a family, never chosen alone
                found |= {f"{name}/{below.removesuffix('.yaml')}@_here_": option[below].node for below in option}
        else:
            found[name.removesuffix(".yaml")] = option.node
    return found if len(found) > 1 else {}


def needs_base(group: str) -> str:
    """Says what the first line of a file of that group must be."""
    first, *others = [f"defaults: [{name}, _self_]" for name in _bases(group)]
    return f"it must build on one of the schemas: write as its first line {' or '.join([first, *others])}"


def check_bases(composed: DictConfig, choices: dict[str, str]) -> None:
    """Raises ValueError if a file of a group does not build on a schema."""
    for group in composed:
        group, bases = str(group), _bases(str(group))
        if bases and OmegaConf.get_type(composed, group) not in map(OmegaConf.get_type, bases.values()):
            raise ValueError(f"{_shown(file_of(f'{group}/{choices.get(group)}'))}: {needs_base(group)}")


def folders() -> list[Path]:
    """The folders that are searched for configurations: the one of --config-dir, then conf/."""
    given = [
        argument.partition("=")[2] or following
        for argument, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=False)
        if argument.partition("=")[0] in ("--config-dir", "-cd", "--config-path", "-cp")
    ]
    return [*map(Path, filter(None, given)), CONF]


def file_of(config: str) -> Path:
    """The file of a configuration, for example of model/nano."""
    candidates = (folder / f"{config}.yaml" for folder in folders())
    return next((path for path in candidates if path.is_file()), CONF / f"{config}.yaml")


def _with_files(message: str) -> str:
    """Replaces Hydra's name of a configuration by its file."""
    files = {name: file_of(name) for name in re.findall(r"[Ii]n '([^']+)'", message)}
    for name, path in files.items():
        message = message.replace(f"'{name}'", _shown(path), 1) if path.is_file() else message
    return message


def _shown(path: Path) -> str:
    """The path, relative to the current folder if it is inside."""
    full = Path(os.path.abspath(path))
    return str(full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else full)

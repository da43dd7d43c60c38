"""Reads the `key=value` arguments of commands that do not use Hydra.

command.py runs a command; overrides.py knows Hydra's grammar.
"""

from collections.abc import Container, Iterable
from typing import Any, TypeVar, get_args, get_type_hints

from data_prep.describe import columns, describe, shown

Settings = TypeVar("Settings")


def key_values(arguments: Iterable[str], keys: Container[str] | None = None, form: str = "key=value") -> dict[str, str]:
    """Maps keys to values; the last value counts if a key is given twice. keys: the known ones; None: any key.

    Raises ValueError if an argument is not key=value or its key is unknown; the message says that it must be `form`.
    """
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or (keys is not None and key not in keys):
            raise ValueError(f"{argument!r} must be {form}; see --help")
        given[key] = value
    return given


def count_of(key: str, value: str) -> int:
    """Reads a whole number. Raises ValueError if it is not one, or is below 0."""
    if not value.isdecimal():
        raise ValueError(f"{key}={value} must be a number of at least 0")
    return int(value)


def settings_of(kind: type[Settings], arguments: list[str]) -> Settings:
    """Builds the dataclass. A text is taken as it stands; null means None only if the field may be None.

    Raises ValueError with key, value and rule.
    """
    types = get_type_hints(kind)
    given: dict[str, Any] = {}
    for key, value in key_values(arguments).items():
        if key not in types:
            raise ValueError(f"unknown key {key}; there are {', '.join(types)}")
        given[key] = _read(key, value, types[key])
    return kind(**given)


def _read(key: str, value: str, kind: Any) -> Any:
    choices = get_args(kind) or (kind,)
    if kind == list[str]:
        return [item.strip() for item in value.strip("[]").split(",")]
    if type(None) in choices and value == "null":
        return None
    if str in choices:
        return value
    number, rule = (int, "a whole number") if int in choices else (float, "a number")
    try:
        return number(value)
    except ValueError:
        raise ValueError(f"{key}={value} must be {rule}{' or null' if type(None) in choices else ''}") from None


def defaults(kind: type) -> str:
    """Lists the fields with their defaults and texts, for --help."""
    return columns((f"{name}={shown(setting.default)}", setting.text) for name, setting in describe(kind).items())

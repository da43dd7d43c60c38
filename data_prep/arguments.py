"""The `key=value` arguments of commands that compose nothing with Hydra.

Apart from command.py, which runs a command, and from overrides.py, which speaks Hydra's grammar.
"""

from collections.abc import Container, Iterable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_type_hints

Settings = TypeVar("Settings")


def key_values(arguments: Iterable[str], keys: Container[str] | None = None, form: str = "key=value") -> dict[str, str]:
    """The values by key; the last one if a key is given twice. keys: the known ones; None: any key.

    Raises ValueError, saying that it must be `form`, if an argument is not key=value or its key is not known.
    """
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or (keys is not None and key not in keys):
            raise ValueError(f"{argument!r} must be {form}; see --help")
        given[key] = value
    return given


def count_of(key: str, value: str) -> int:
    """The number. Raises ValueError unless it is a whole one of at least 0."""
    if not value.isdecimal():
        raise ValueError(f"{key}={value} must be a number of at least 0")
    return int(value)


def settings_of(kind: type[Settings], arguments: list[str]) -> Settings:
    """The dataclass. A text is taken as it stands, whatever it holds; null only where the key may be None.

    ValueError: key, value, rule.
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
    """A line each, for --help."""
    lines = []
    for item in fields(kind):
        value = item.default if item.default_factory is MISSING else item.default_factory()
        value = ",".join(value) if isinstance(value, list) else value
        lines.append(f"  {item.name}={'null' if value is None else value}")
    return "\n".join(lines)

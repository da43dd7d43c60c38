"""Settings of a command from its `key=value` arguments, for commands that freeze no configuration."""

from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_type_hints

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], arguments: list[str]) -> Settings:
    """The dataclass. A text is taken as it stands, whatever it holds; null only where the key may be None.

    ValueError: key, value, rule.
    """
    types, given = get_type_hints(kind), {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} must be key=value; see --help")
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

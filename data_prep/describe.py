"""Reads the comments beside the fields of a dataclass, for help texts and settings pages.

In data_prep because commands without torch show their settings, too.
"""

import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

LINE = 120  # characters of a line of --help
TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "any", NoneType: "null"}


class Setting(NamedTuple):
    """Describes one field. default: MISSING if the user must give it."""

    type: Any
    default: Any
    text: str


def describe(kind: type) -> dict[str, Setting]:
    """Returns type, default and text of each field. The text is the comment on its line, or the `#:` lines above it."""
    types, texts = get_type_hints(kind), dict[str, str]()
    for base in reversed(kind.__mro__):
        texts |= _comments(inspect.getsource(base)) if is_dataclass(base) else {}
    return {
        item.name: Setting(
            types[item.name],
            item.default if item.default_factory is MISSING else item.default_factory(),
            texts.get(item.name, ""),
        )
        for item in fields(kind)
    }


def type_name(kind: Any) -> str:
    """The type in words, such as `integer or null`."""
    if isinstance(kind, UnionType):
        return " or ".join(map(type_name, get_args(kind)))
    if get_origin(kind) is list:
        return f"list of {type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return " to ".join(["map", *map(type_name, get_args(kind))]).replace("map to", "map of")
    return TYPES.get(kind, "")


def columns(settings: Iterable[tuple[str, str]]) -> str:
    """Lists settings, `key=value`, and their texts in two columns. Long texts are wrapped."""
    rows = list(settings)
    width = 2 + min(max(len(setting) for setting, _ in rows), LINE // 3)
    lines = []
    for setting, text in rows:
        wrapped = textwrap.wrap(text, LINE - width - 2) or [""]
        if len(setting) > width - 2:
            wrapped.insert(0, "")
        lines += [
            f"  {left:<{width}}{line}".rstrip()
            for left, line in zip([setting, *[""] * (len(wrapped) - 1)], wrapped, strict=True)
        ]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as --help shows it and a command line takes it."""
    if isinstance(value, list):
        return ",".join(value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _comments(source: str) -> dict[str, str]:
    """Returns the comments, by the first name on their line."""
    texts: dict[str, str] = {}
    above: list[str] = []
    name = ""
    line = 0
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("#:"):
            above.append(token.string.removeprefix("#:").strip())
        elif token.type == tokenize.COMMENT and token.start[0] == line:
            texts[name] = token.string.removeprefix("#").strip()
        elif token.type == tokenize.NAME and token.start[0] != line:
            name, line = token.string, token.start[0]
            if above:
                texts[name], above = " ".join(above), []
    return texts

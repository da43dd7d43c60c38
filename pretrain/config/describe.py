"""Reads the comments beside the fields of a dataclass, for help texts and settings pages.

Separate from the dataclasses because it is used for all of them, also for the commands' settings.
"""

import inspect
import io
import tokenize
from dataclasses import MISSING, fields
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """Describes one field. default: MISSING if the user must give it."""

    type: Any
    default: Any
    text: str


def describe(kind: type) -> dict[str, Setting]:
    """Returns type, default and text of each field. The text is the comment on its line, or the `#:` lines above it."""
    texts = _comments(inspect.getsource(kind))
    return {
        item.name: Setting(
            item.type,
            item.default if item.default_factory is MISSING else item.default_factory(),
            texts.get(item.name, ""),
        )
        for item in fields(kind)
    }


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

"""Texts of tokens, beside the ids of rows."""

from functools import cached_property
from pathlib import Path

from data_prep.errors import DataError
from data_prep.tokenizer import Tokenizer


class TokenTexts:
    """Names tokens by their text. The tokenizer is read with the first one."""

    def __init__(self, tokenizer: Path | None) -> None:
        self._folder = tokenizer

    def named(self, row: int) -> str:
        """Returns `"token" (id)` as Markdown; the id alone if the row has no token, or there is no tokenizer."""
        try:
            data = self._tokenizer.decode_bytes([row]) if self._tokenizer else b""
        except DataError:
            data = b""
        if not data:
            return str(row)
        text = "".join(_visible(c) for c in data.decode("utf-8", errors="backslashreplace"))
        text = f'"{text}"'
        return f"`` {text} `` ({row})" if "`" in text else f"`{text}` ({row})"

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        try:
            return None if self._folder is None else Tokenizer.load(self._folder)
        except (OSError, ValueError):
            return None


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()

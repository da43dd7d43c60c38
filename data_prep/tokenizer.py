"""Turns text into ids and back, with a tiktoken encoding that is defined by its files, not by its name."""

import math
import os
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha1
from pathlib import Path
from tempfile import gettempdir
from typing import Any, ClassVar

import numpy as np
import tiktoken

from data_prep.bpe import PATTERNS, SMALLEST_VOCAB, train_bpe
from data_prep.errors import DataError, headline
from data_prep.tokenizer_kind import is_hf, other_tokenizer
from data_prep.tokenizer_spec import END_OF_DOCUMENT, MOST_ROWS, TokenizerSpec, read_ranks

LONGEST_RUN = 1 << 16  # characters; a run of a million spaces overflows the stack of tiktoken's regex engine
_BLOCK = LONGEST_RUN // 2  # a run of LONGEST_RUN characters covers at least one whole aligned block
_RUN_PIECES = re.compile(rf"\s{{1,{LONGEST_RUN}}}|\S{{1,{LONGEST_RUN}}}")
PROBE = "".join(map(chr, range(0x3100)))  # most scripts: letters, digits, signs and spaces side by side
DOWNLOAD_TIMEOUT = 30.0  # seconds; tiktoken itself sets none

_BLOB = "https://openaipublic.blob.core.windows.net/"
_URLS = {
    "gpt2": [_BLOB + "gpt-2/encodings/main/vocab.bpe", _BLOB + "gpt-2/encodings/main/encoder.json"],
    "p50k_edit": [_BLOB + "encodings/p50k_base.tiktoken"],
    "o200k_harmony": [_BLOB + "encodings/o200k_base.tiktoken"],
}


class Tokenizer:
    """A tokenizer ready for use. `decode_bytes` inverts `encode` on any text."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        try:
            self._encoding = tiktoken.Encoding(
                spec.name,
                pat_str=spec.pattern,
                mergeable_ranks=spec.ranks,
                special_tokens=spec.special_tokens,
            )
        except ValueError as error:
            raise DataError(f"tokenizer {spec.name}: {headline(error)}") from error

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Loads a folder with `ranks.tiktoken` and `spec.json`. Raises DataError if they are missing or wrong."""
        return cls(TokenizerSpec.load(Path(folder)))

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """tiktoken's encoding of that name. Raises DataError if there is none, or if it cannot be downloaded; the
        message then says which file to put where.
        """
        known = tiktoken.list_encoding_names()
        if name not in known:
            raise DataError(f"tokenizer.name={name} must be one of {', '.join(sorted(known))}")
        try:
            with _socket_timeout(DOWNLOAD_TIMEOUT):
                encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
            raise DataError(_how_to_get(name, error)) from error
        ranks, special_tokens = encoding._mergeable_ranks, encoding._special_tokens
        return cls(TokenizerSpec(name, encoding._pat_str, special_tokens, ranks))

    def check_pattern(self) -> None:
        """Raises DataError if the pattern does not match every character, because unmatched text would be lost."""
        kept = self.decode(self._encode(PROBE))
        if kept != PROBE:
            lost = next((given for given, decoded in zip(PROBE, kept, strict=False) if given != decoded), PROBE[-1])
            rule = f"must match all text: {lost!r} does not match, and would be lost"
            raise DataError(f"tokenizer.pattern={self.spec.pattern} {rule}")

    def save(self, folder: Path | str) -> None:
        self.spec.save(Path(folder))

    @property
    def vocab_size(self) -> int:
        """The number of rows that a model needs: the largest id + 1."""
        return self.spec.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint

    @property
    def end_of_document(self) -> int:
        return self.spec.end_of_document

    def encode(self, text: str) -> np.ndarray:
        """The ids of the text, uint32 [tokens]. The name of a special token inside the text is ordinary text.

        A run of more than 65,536 spaces, or of other characters, is encoded in pieces of that length.
        """
        if not may_have_long_run(text):
            return self._encode(text)
        return np.concatenate([self._encode(piece) for piece in _pieces(text)])

    def _encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids. Bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of the ids. Raises DataError if an id has no token."""
        try:
            return self._encoding.decode_bytes([int(id) for id in ids])
        except KeyError as error:
            raise DataError(f"tokenizer {self.spec.name}: {headline(error)}") from error


def may_have_long_run(text: str) -> bool:
    """True if a run of spaces, or of other characters, may be longer than LONGEST_RUN. Costs almost nothing."""
    for start in range(0, len(text) - _BLOCK + 1, _BLOCK):
        block = text[start : start + _BLOCK]
        if block.isspace() or len(block.split(None, 1)[0]) == _BLOCK:
            return True
    return False


def _pieces(text: str) -> Iterator[str]:
    """Cuts the text inside its long runs, nowhere else."""
    start = 0
    for run in _RUN_PIECES.finditer(text):
        if len(run.group()) == LONGEST_RUN:
            yield text[start : run.end()]
            start = run.end()
    if start < len(text):
        yield text[start:]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _how_to_get(name: str, error: Exception) -> str:
    urls = _URLS.get(name, [f"{_BLOB}encodings/{name}.tiktoken"])
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    where = Path(folder) if folder else Path(gettempdir()) / "data-gym-cache"
    files = " and ".join(f"{url} as {where / sha1(url.encode()).hexdigest()}" for url in urls)
    return (
        f"tokenizer {name} cannot be downloaded ({type(error).__name__}). With network, fetch {files}"
        " (TIKTOKEN_CACHE_DIR sets that folder), or use tokenizer=file tokenizer.path=..."
    )


@dataclass
class TokenizerConfig(ABC):
    """The group `tokenizer`: one subclass per option."""

    kind: ClassVar[str]

    @abstractmethod
    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Builds the tokenizer. `texts` opens the training documents; only a trained tokenizer reads them."""

    def describe(self) -> dict[str, Any]:
        """The settings that the tokenizer depends on, for the manifest."""
        return {"kind": self.kind, **asdict(self)}


@dataclass
class BpeTokenizer(TokenizerConfig):
    """A byte-level BPE trained on an even sample of the corpus."""

    kind: ClassVar[str] = "bpe"
    vocab_size: int = 8192  # tokens, <|endoftext|> included
    pattern: str = "cl100k"  # split pattern: cl100k, gpt2 or a regular expression
    sample_mib: float = 16.0  # MiB of text to train on
    sample_within_mib: float = 4096.0  # MiB at the start of the corpus from which the sample is drawn evenly

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST_VOCAB:
            raise DataError(
                f"tokenizer.vocab_size={self.vocab_size} must be at least {SMALLEST_VOCAB}:"
                " the 256 bytes and <|endoftext|>"
            )
        for key in ("sample_mib", "sample_within_mib"):
            if not 0 < getattr(self, key) < math.inf:
                raise DataError(f"tokenizer.{key}={getattr(self, key)} must be positive and finite")

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        pattern = PATTERNS.get(self.pattern, self.pattern)
        sample_bytes, within_bytes = int(self.sample_mib * 2**20), int(self.sample_within_mib * 2**20)
        return Tokenizer(train_bpe(texts(), self.vocab_size, pattern, sample_bytes, within_bytes))


@dataclass
class NamedTokenizer(TokenizerConfig):
    """One of tiktoken's own encodings."""

    kind: ClassVar[str] = "named"
    name: str  # name of the encoding

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        return Tokenizer.named(self.name)


@dataclass
class FileTokenizer(TokenizerConfig):
    """A tokenizer on disk: a folder written by this program, Hugging Face's tokenizer.json or its folder, or a bare
    `.tiktoken` file with the other keys.
    """

    kind: ClassVar[str] = "file"
    path: str  # the folder or file
    pattern: str = ""  # of a bare file: cl100k, gpt2 or a regular expression
    end_of_document: int | None = None  # id of <|endoftext|>, for a bare file or without config.json

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        return self._built

    @cached_property
    def _built(self) -> Tokenizer:
        path = Path(self.path)
        if is_hf(path):
            from data_prep.hf_tokenizer import from_hf  # it imports this module

            if self.pattern:
                raise DataError(f"tokenizer.pattern={self.pattern} must be left out: {path} has its own")
            return Tokenizer(from_hf(path, self.end_of_document))
        if path.is_dir():
            if self.pattern or self.end_of_document is not None:
                raise DataError(f"tokenizer.path={path} is a folder: pattern and end_of_document are in its spec.json")
            return Tokenizer.load(path)
        if why := other_tokenizer(path):
            raise DataError(f"tokenizer.path={path} {why}")
        ranks = read_ranks(path)
        if not self.pattern or self.end_of_document is None:
            raise DataError(
                f"tokenizer.path={path} has only ranks: give tokenizer.pattern={'|'.join(PATTERNS)} or a"
                f" regular expression, and tokenizer.end_of_document=, the id of {END_OF_DOCUMENT}"
            )
        key = f"tokenizer.end_of_document={self.end_of_document}"
        if taken := [token for token, id in ranks.items() if id == self.end_of_document]:
            raise DataError(
                f"{key} must be a free id, but {path} uses it for {taken[0]!r}; {max(ranks.values()) + 1} is free"
            )
        if not 0 <= self.end_of_document < MOST_ROWS:
            raise DataError(f"{key} must be in [0, {MOST_ROWS})")
        pattern = PATTERNS.get(self.pattern, self.pattern)
        return Tokenizer(TokenizerSpec(path.stem, pattern, {END_OF_DOCUMENT: self.end_of_document}, ranks))

    def describe(self) -> dict[str, Any]:
        """Describes the tokenizer by its content, because the file may change or move."""
        return {"kind": self.kind, "fingerprint": self._built.fingerprint}

"""Reads and writes a tokenizer's files, `ranks.tiktoken` and `spec.json`. Without tiktoken, for the trainer."""

import base64
import binascii
import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.durable import DurableFile, publish
from data_prep.errors import DataError, headline
from data_prep.lfs import refuse_pointer

RANKS_FILE = "ranks.tiktoken"
SPEC_FILE = "spec.json"
END_OF_DOCUMENT = "<|endoftext|>"
MOST_ROWS = 2**24  # far above any vocabulary; token files could hold ids below 2^31


@dataclass(frozen=True)
class TokenizerSpec:
    """The definition of a tokenizer: the ranks of its byte strings, its split pattern, its special tokens.

    Raises DataError if a single byte has no rank, if an id is used twice or out of bounds, or if the end-of-document
    token is missing.
    """

    name: str
    pattern: str
    special_tokens: dict[str, int]
    ranks: dict[bytes, int]

    def __post_init__(self) -> None:
        for byte in range(256):
            if bytes([byte]) not in self.ranks:
                raise DataError(f"tokenizer {self.name}: byte 0x{byte:02x} has no rank; all 256 bytes need one")
        rule = f"tokenizer {self.name}: ids must be distinct, and in [0, {MOST_ROWS})"
        token_of: dict[int, object] = {}
        for token, id in chain[tuple[object, int]](self.ranks.items(), self.special_tokens.items()):
            if id in token_of:
                raise DataError(f"{rule}: {token_of[id]!r} and {token!r} both have {id}")
            if not 0 <= id < MOST_ROWS:
                raise DataError(f"{rule}: {token!r} has {id}")
            token_of[id] = token
        if END_OF_DOCUMENT not in self.special_tokens:
            raise DataError(f"tokenizer {self.name}: special token {END_OF_DOCUMENT} is missing; it ends each document")

    @property
    def vocab_size(self) -> int:
        """The number of rows that a model needs: the largest id + 1."""
        return max(*self.ranks.values(), *self.special_tokens.values()) + 1

    @property
    def end_of_document(self) -> int:
        return self.special_tokens[END_OF_DOCUMENT]

    def has_rows_of(self, other: "TokenizerSpec") -> bool:
        """True if each row of a matrix has the same meaning for both: the same bytes, and the same end-of-document id.
        The patterns may differ.
        """
        return self.ranks == other.ranks and self.end_of_document == other.end_of_document

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over ranks, pattern and special tokens, each in one canonical form. The name is not included."""
        rest = {"pattern": self.pattern, "special_tokens": self.special_tokens}
        digest = hashlib.sha256(self._formatted_ranks)
        digest.update(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode())
        return digest.hexdigest()

    @cached_property
    def _formatted_ranks(self) -> bytes:
        return format_ranks(self.ranks)

    def bytes_of_ids(self) -> np.ndarray:
        """The length of each id's text in bytes, int64 [vocab_size]; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for text, id in self.ranks.items():
            lengths[id] = len(text)
        return lengths

    def save(self, folder: Path) -> None:
        """Writes both files, each whole or not at all, `spec.json` last."""
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"name": self.name, "pattern": self.pattern, "special_tokens": self.special_tokens}
        with ExitStack() as stack:
            files = [DurableFile(folder / name) for name in (RANKS_FILE, SPEC_FILE)]
            for file in files:
                stack.callback(file.discard)  # does nothing after publish
            files[0].write(self._formatted_ranks)
            files[1].write(json.dumps(spec, indent=2).encode() + b"\n")
            publish(files[:1], files[1:])

    @classmethod
    def load(cls, folder: Path) -> "TokenizerSpec":
        """Reads both files. Raises DataError with the name of the file if one is missing or wrong."""
        path = folder / SPEC_FILE
        refuse_pointer(path)
        try:
            spec = json.loads(path.read_bytes())
            name, pattern = str(spec["name"]), str(spec["pattern"])
            special_tokens = {str(token): int(id) for token, id in spec["special_tokens"].items()}
        except FileNotFoundError:
            raise DataError(f"{path} is missing: a tokenizer folder has {RANKS_FILE} and {SPEC_FILE}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path} must hold name, pattern and special_tokens: {type(error).__name__} {headline(error)}"
            ) from error
        return cls(name, pattern, special_tokens, read_ranks(folder / RANKS_FILE))


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """Formats ranks as tiktoken does: one line per token, base64 and rank, in the order of the ranks."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a `.tiktoken` file. tiktoken's own reader caches by path, so it would miss a changed file."""
    refuse_pointer(path)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}, line {number}: not a base64 token and its rank") from None
    if not ranks:
        raise DataError(f"{path} is empty")
    return ranks

"""Reads other programs' tokens as the stream that our files hold: each document is followed by the end-of-document id.

Files are memory-mapped and read in pieces, so memory does not depend on the size of a file or a document.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

PIECE_TOKENS = 1 << 20


class Ends(Protocol):
    def __call__(self, start: int, stop: int) -> np.ndarray:
        """The places in (start, stop] at which a document ends, rising, int64."""


@dataclass(frozen=True)
class Tokens:
    """An opened file: its ids, memory-mapped. ends: the documents' ends from its index; None if it has no index."""

    path: Path
    ids: np.ndarray
    ends: Ends | None = None

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self.ids), PIECE_TOKENS):
            yield start, self.ids[start : start + PIECE_TOKENS]


class TokenSpan(NamedTuple):
    """Some ids of the file `path`. ends: the places in [1, len(ids)] at which documents end, rising."""

    path: Path
    ids: np.ndarray
    ends: np.ndarray


def stream(files: Iterable[Tokens], end_of_document: int) -> Iterator[TokenSpan]:
    """Yields the documents of the files, each with its end-of-document id. All files must have an index, or none."""
    separated: list[Tokens] = []
    for file in files:
        if file.ends is None:
            separated.append(file)
        else:
            yield from _indexed(file, file.ends, end_of_document)
    yield from _separated(separated, end_of_document)


def _indexed(file: Tokens, ends: Ends, end_of_document: int) -> Iterator[TokenSpan]:
    """Yields the documents of the index. Adds the end-of-document id if it is missing; skips empty documents."""
    for start, ids in file.pieces():
        places = ends(start, start + len(ids)) - start
        lacking = ids[places - 1] != end_of_document
        yield TokenSpan(file.path, np.insert(ids, places[lacking], end_of_document), places + np.cumsum(lacking))


def _separated(files: Iterable[Tokens], end_of_document: int) -> Iterator[TokenSpan]:
    """Splits the stream into documents at the end-of-document id: llm.c puts it before each, nanoGPT after each.

    In both it stands between two documents; ours has none before the first and one after the last. A document may
    continue in the next file.
    """
    begun = unfinished = False
    for file in files:
        for _, ids in file.pieces():
            if not begun and ids[0] == end_of_document:
                ids = ids[1:]
            begun = True
            places = np.flatnonzero(ids == end_of_document) + 1
            if len(ids):
                unfinished = places[-1:].tolist() != [len(ids)]
            yield TokenSpan(file.path, ids, places)
    if unfinished:
        yield TokenSpan(file.path, np.array([end_of_document]), np.array([1]))

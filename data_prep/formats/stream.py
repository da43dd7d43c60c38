"""Others' tokens as the stream that our files hold: documents one after the other, each ended by one id.

A file is memory-mapped and read in pieces, so that no size of file or document costs memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

PIECE_TOKENS = 1 << 20


class Ends(Protocol):
    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Places in (start, stop] of the tokens where a document ends, rising, int64."""


@dataclass(frozen=True)
class Tokens:
    """An opened file: its ids, memory-mapped. ends: where its index has documents end; None where it has no index."""

    path: Path
    ids: np.ndarray
    ends: Ends | None = None

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self.ids), PIECE_TOKENS):
            yield start, self.ids[start : start + PIECE_TOKENS]


class TokenSpan(NamedTuple):
    """ids, and the places in them, rising, where a document ends, [1, len(ids)]. path: the file they are of."""

    path: Path
    ids: np.ndarray
    ends: np.ndarray


def stream(files: Iterable[Tokens], end_of_document: int) -> Iterator[TokenSpan]:
    """The documents of the files, all with an index or all without, each with its end-of-document id."""
    separated: list[Tokens] = []
    for file in files:
        if file.ends is None:
            separated.append(file)
        else:
            yield from _indexed(file, file.ends, end_of_document)
    yield from _separated(separated, end_of_document)


def _indexed(file: Tokens, ends: Ends, end_of_document: int) -> Iterator[TokenSpan]:
    """Documents are the index's. One that lacks the id at its end is given it; one without a token is left out."""
    for start, ids in file.pieces():
        places = ends(start, start + len(ids)) - start
        lacking = ids[places - 1] != end_of_document
        yield TokenSpan(file.path, np.insert(ids, places[lacking], end_of_document), places + np.cumsum(lacking))


def _separated(files: Iterable[Tokens], end_of_document: int) -> Iterator[TokenSpan]:
    """Documents are told apart by the id alone, which some put before each (llm.c) and others after it (nanoGPT).

    Either way it stands between two, and the stream becomes ours with none before the first and one after the last.
    A document may go on from one file into the next.
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

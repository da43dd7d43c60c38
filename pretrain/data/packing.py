"""Packing of whole documents into windows: best-fit decreasing (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv:2404.10830).

A document of n tokens has n - 1 positions with a target: once per epoch, all tokens except the last (the
end-of-document id) are inputs, and all except the first are targets. A document with more than T positions fills
windows of T positions each. Its rest, and every shorter document, goes whole into the window with the least free
space that still fits it. The plan is a pure function of the documents' lengths.
"""

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from itertools import accumulate

import numpy as np

from data_prep.token_file import TokenFile

from .dataset import IGNORED, DocumentSpan, Window, Windows


class PackedWindows(Windows):
    """Packed variant of `Windows`, with separate documents. Memory: 12 bytes per document, 70 during planning."""

    def __init__(self, files: tuple[TokenFile, ...], seq_len: int) -> None:
        super().__init__(files, seq_len, masked=True)
        self._before = [0, *accumulate(file.documents for file in files)]  # number of documents before each file
        places = np.concatenate([np.maximum(file.document_lengths() - 1, 0) for file in files])
        wholes, rest = np.divmod(places, seq_len)
        self._long = np.flatnonzero(wholes)  # documents that fill whole windows
        self._wholes = np.cumsum(wholes[self._long])  # number of these windows, cumulative
        pieces = np.flatnonzero(rest)
        bins = best_fit(rest[pieces], seq_len)
        order = np.argsort(bins, kind="stable")
        self._pieces = pieces[order]  # documents, by window
        # First piece of each window, and the end.
        self._firsts = np.searchsorted(bins[order], np.arange(bins.max(initial=-1) + 2))
        self.documents_cut, self.places = int((wholes + (rest > 0) > 1).sum()), int(places.sum())

    def __len__(self) -> int:
        return self._shared + int(self._wholes[-1] if len(self._wholes) else 0)

    @property
    def _shared(self) -> int:
        """Number of windows with packed documents. The windows filled by one long document come after them."""
        return len(self._firsts) - 1

    @property
    def waste(self) -> float:
        """Fraction of all positions that is padding."""
        return 1 - self.places / (len(self) * self.seq_len)

    @property
    def summary(self) -> str:
        return f"packed into {len(self):,} windows, {self.waste:.2%} padding, {self.documents_cut:,} documents cut"

    def fill(self, index: int, window: Window) -> None:
        assert window.starts_T is not None
        end = 0
        for file, document, offset, start, end in self.documents(index):
            low = file.document_start(document) + offset
            window.tokens_T[start:end] = file.tokens[low : low + end - start]
            window.targets_T[start:end] = file.tokens[low + 1 : low + end - start + 1]
            window.starts_T[start:end] = start
        window.tokens_T[end:], window.targets_T[end:], window.starts_T[end:] = 0, IGNORED, end

    def documents(self, index: int) -> list[DocumentSpan]:
        self._check(index)
        if index >= self._shared:
            window = index - self._shared
            i = int(np.searchsorted(self._wholes, window, side="right"))
            earlier = window - (int(self._wholes[i - 1]) if i else 0)
            return [DocumentSpan(*self._document(int(self._long[i])), earlier * self.seq_len, 0, self.seq_len)]
        parts, at = [], 0
        for number in self._pieces[self._firsts[index] : self._firsts[index + 1]].tolist():
            file, document = self._document(number)
            places = file.document_start(document + 1) - file.document_start(document) - 1
            rest = places % self.seq_len
            parts.append(DocumentSpan(file, document, places - rest, at, at + rest))
            at += rest
        return parts

    def _document(self, number: int) -> tuple[TokenFile, int]:
        """Returns the file of a document and its number there. number: counted over all files."""
        i = bisect_right(self._before, number) - 1
        return self.files[i], number - self._before[i]


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the bin of each item [n], numbered from 0. Every size must be in [1, capacity].

    Items are placed from large to small, each in the bin with the least sufficient room, otherwise in a new bin. Items
    of equal size are placed together in bins of equal room, in at most capacity² rounds for any number of items.
    """
    order = np.argsort(-sizes, kind="stable")
    bins, made = np.empty(len(sizes), np.int64), 0
    rooms: list[int] = []  # rooms of the open bins, ascending
    having: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def keep(room: int, some: np.ndarray) -> None:
        if room and len(some):
            if not having[room]:
                insort(rooms, room)
            having[room].append(some)

    counts = np.bincount(sizes)
    for size in np.flatnonzero(counts)[::-1].tolist():
        items, order = np.split(order, [counts[size]])
        while len(items):
            i = bisect_left(rooms, size)
            if i == len(rooms):
                new = -(-len(items) // (capacity // size))
                keep(capacity, np.arange(made, made + new))
                made += new
            room, each = rooms[i], rooms[i] // size
            some = having[room].pop()
            if not having[room]:
                del rooms[i]
            needed = -(-len(items) // each)
            keep(room, some[needed:])
            some = some[:needed]
            now, items = np.split(items, [each * len(some)])
            bins[now] = np.repeat(some, each)[: len(now)]
            full, over = divmod(len(now), each)
            keep(room - each * size, some[:full])
            keep(room - over * size, some[full:])
    return bins

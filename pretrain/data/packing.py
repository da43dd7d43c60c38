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
        self._shared = (
            len(self._firsts) - 1
        )  # windows with packed documents; those of one long document come after them
        self._count = self._shared + int(wholes.sum())
        self.documents_cut, self.places = int((wholes + (rest > 0) > 1).sum()), int(places.sum())

    @property
    def waste(self) -> float:
        """Fraction of all positions that is padding."""
        return 1 - self.places / (len(self) * self.seq_len)

    @property
    def summary(self) -> str:
        return f"packed into {len(self):,} windows, {self.waste:.2%} padding, {self.documents_cut:,} documents cut"

    def fill(self, index: int, window: Window) -> None:
        tokens_T, targets_T, starts_T = window
        assert starts_T is not None
        end, firsts = 0, []
        for file, _, _, low, places in self._spans(index):
            start, end, stream = end, end + places, file.tokens
            firsts.append((start, stream[low]))
            targets_T[start:end] = stream[low + 1 : low + places + 1]
            starts_T[start:end].fill(start)
        tokens_T[1:end] = targets_T[: end - 1]  # faster than a second conversion
        for start, token in firsts:
            tokens_T[start] = token
        if end < self.seq_len:
            tokens_T[end:], targets_T[end:], starts_T[end:] = 0, IGNORED, end

    def documents(self, index: int) -> list[DocumentSpan]:
        parts, at = [], 0
        for file, document, offset, _, places in self._spans(index):
            parts.append(DocumentSpan(file, document, offset, at, at + places))
            at += places
        return parts

    def _spans(self, index: int) -> list[tuple[TokenFile, int, int, int, int]]:
        """Lists the documents of a window: file, document, offset in it, place in the file, and number of positions."""
        self._check(index)
        if index >= self._shared:
            window = index - self._shared
            i = int(np.searchsorted(self._wholes, window, side="right"))
            earlier = window - (int(self._wholes[i - 1]) if i else 0)
            file, document = self._document(int(self._long[i]))
            offset = earlier * self.seq_len
            return [(file, document, offset, file.document_start(document) + offset, self.seq_len)]
        spans, firsts = [], self._firsts.data  # a memoryview gives Python's own numbers
        for number in self._pieces[firsts[index] : firsts[index + 1]].tolist():
            file, document = self._document(number)
            begin, end = file.document_range(document)
            rest = (end - begin - 1) % self.seq_len
            low = end - 1 - rest
            spans.append((file, document, low - begin, low, rest))
        return spans

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

"""Packing of whole documents into windows: best-fit decreasing (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv:2404.10830).

A document of n tokens has n - 1 positions with a target: once per epoch, all tokens except the last (the
end-of-document id) are inputs, and all except the first are targets. A document with more than T positions fills
windows of T positions each. Its rest, and every shorter document, goes whole into the window with the least free
space that still fits it. The plan is a pure function of the documents' lengths.
"""

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from data_prep.token_file import TokenFile

from .dataset import DocumentSpan, Parts, Window, Windows


class PackedWindows(Windows):
    """Packed variant of `Windows`, with separate documents. Memory: 12 bytes per document, 60 during planning."""

    def __init__(self, files: tuple[TokenFile, ...], seq_len: int) -> None:
        super().__init__(files, seq_len, masked=True)
        lengths = np.concatenate([file.document_lengths() for file in files])
        wholes, rest = np.divmod(np.maximum(lengths - 1, 0), seq_len)
        self.documents_cut = int((wholes + (rest > 0) > 1).sum())
        self.places = int(wholes.sum()) * seq_len + int(rest.sum())
        long = np.flatnonzero(wholes)
        self._wholes = _compact(np.cumsum(wholes[long]))  # windows filled by one long document, cumulative
        del wholes
        pieces = np.flatnonzero(rest)
        bins = best_fit(rest[pieces], seq_len)
        order = np.argsort(bins, kind="stable")
        pieces, bins = pieces[order], bins[order]
        del order
        # First piece of each window, and the end.
        self._firsts = _compact(np.searchsorted(bins, np.arange(bins.max(initial=-1) + 2)))
        del bins
        self._shared = len(self._firsts) - 1  # windows with packed documents; those of one long document come after
        self._count = self._shared + (int(self._wholes[-1]) if len(long) else 0)
        rest, ends = rest[pieces], np.cumsum(lengths)
        self._sizes = _compact(rest)  # positions of each piece, by window
        self._places = ends[pieces] - 1 - rest  # first token in the stream
        self._long = ends[long] - lengths[long]  # where documents begin that fill whole windows

    @property
    def waste(self) -> float:
        """Fraction of all positions that is padding."""
        return 1 - self.places / (len(self) * self.seq_len)

    @property
    def summary(self) -> str:
        return f"packed into {len(self):,} windows, {self.waste:.2%} padding, {self.documents_cut:,} documents cut"

    def batch(self, indices: Sequence[int]) -> Window:
        parts = Parts(len(indices), self.seq_len)
        place = 0
        for index in indices:
            end = place + self.seq_len
            for begin, size in self._pieces(index):
                file, low = self._file(begin)
                stream = file.read(low, low + size + 1)
                parts.inputs.append(stream[:-1])
                parts.targets.append(stream[1:])
                parts.starts.append(place)
                place += size
            parts.starts.append(place)  # of the padding, or of the next window
            parts.pad(end - place)
            place = end
        return parts.joined(masked=True)

    def documents(self, index: int) -> list[DocumentSpan]:
        parts, at = [], 0
        for place, size in self._pieces(index):
            file, low = self._file(place)
            parts.append(DocumentSpan(file, *file.document_at(low), at, at + size))
            at += size
        return parts

    def _reads(self, index: int) -> Iterable[tuple[TokenFile, int, int]]:
        for place, size in self._pieces(index):
            file, low = self._file(place)
            yield file, low, low + size + 1

    def _pieces(self, index: int) -> Iterable[tuple[int, int]]:
        """Returns the pieces of documents in a window: place in the stream, and number of positions."""
        self._check(index)
        if index >= self._shared:
            window = index - self._shared
            i = bisect_right(self._wholes.data, window)  # a memoryview: searchsorted would copy all to int64
            earlier = window - (int(self._wholes[i - 1]) if i else 0)
            return [(int(self._long[i]) + earlier * self.seq_len, self.seq_len)]
        first, end = self._firsts[index : index + 2].tolist()
        return zip(self._places[first:end].tolist(), self._sizes[first:end].tolist(), strict=True)


def _compact(numbers: np.ndarray) -> np.ndarray:
    """Converts numbers from 0 on to the smallest type that holds them."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))


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

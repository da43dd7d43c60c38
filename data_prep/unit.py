"""Cuts a corpus into work units: lists of pieces of files, or of documents. The same corpus gives the same units."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from data_prep.long import LongDocument
from data_prep.source import Document, Piece, Rejected

LAST_UNITS = 8  # the last text, of this many units, is cut into smaller units

Item = Document | LongDocument | Rejected


@dataclass(frozen=True)
class WorkUnit:
    """A work unit: `pieces` of files, or the documents themselves. `size`: estimated bytes of text."""

    index: int
    size: int
    pieces: tuple[Piece, ...] = ()
    documents: tuple[Item, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """The unit's number and files, for error messages."""
        names = [piece.path for piece in self.pieces] or [item.id for item in self.documents]
        return f"unit {self.index} ({' to '.join(dict.fromkeys([names[0], names[-1]]))})"

    @property
    def key(self) -> str:
        """A digest of the unit's input: it changes when the input does."""
        digest = blake2b(digest_size=16)
        for piece in self.pieces:
            digest.update(
                f"{piece.path}\0{piece.stamp}\0{piece.start}\0{piece.stop}\n".encode("utf-8", "surrogateescape")
            )
        for item in self.documents:
            digest.update(repr(item[:2]).encode())  # with the text: documents of the hub are never LongDocuments
        return digest.hexdigest()


def grouped(pieces: Iterable[Piece], unit_bytes: int) -> list[WorkUnit]:
    """Groups pieces in order into units of about `unit_bytes`. Splits pieces if possible; joins adjacent ranges.

    The last units are smaller, so that all cores finish at about the same time.
    """
    waiting = list(pieces)
    left = sum(piece.size for piece in waiting)
    units: list[WorkUnit] = []
    unit: list[Piece] = []
    room = 0

    def open_unit() -> None:
        nonlocal room
        room = max(1, min(unit_bytes, max(left // LAST_UNITS, unit_bytes // LAST_UNITS)))

    def add(piece: Piece) -> None:
        nonlocal left, room
        if unit and unit[-1].joins(piece):
            unit[-1] = unit[-1].join(piece)
        else:
            unit.append(piece)
        left, room = left - piece.size, room - piece.size
        if room <= 0:
            close()

    def close() -> None:
        units.append(WorkUnit(len(units), sum(piece.size for piece in unit), tuple(unit)))
        unit.clear()
        open_unit()

    open_unit()
    for piece in waiting:
        while piece.splittable and piece.size > room:
            head, piece = piece.cut(room)
            add(head)
        add(piece)
    if unit:
        close()
    return units

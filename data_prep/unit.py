"""A corpus cut into units of work: lists of pieces of files, or of documents, always the same for the same corpus."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from data_prep.long import LongDocument
from data_prep.source import Document, Piece, Rejected

LAST_UNITS = 8  # the text of so many units, at the end, is cut into smaller ones

Item = Document | LongDocument | Rejected


@dataclass(frozen=True)
class WorkUnit:
    """A unit of work, and what it is: `pieces` of files, or the documents themselves. `size`: bytes, about."""

    index: int
    size: int
    pieces: tuple[Piece, ...] = ()
    documents: tuple[Item, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """For a line that says where something went wrong."""
        names = [piece.path for piece in self.pieces] or [item.id for item in self.documents]
        return f"unit {self.index} ({' to '.join(dict.fromkeys([names[0], names[-1]]))})"

    @property
    def key(self) -> str:
        """Changes when what the unit is made of does."""
        digest = blake2b(digest_size=16)
        for piece in self.pieces:
            digest.update(
                f"{piece.path}\0{piece.stamp}\0{piece.start}\0{piece.stop}\n".encode("utf-8", "surrogateescape")
            )
        for item in self.documents:
            digest.update(repr(item[:2]).encode())  # texts, for no document of the hub is a LongDocument
        return digest.hexdigest()


def grouped(pieces: Iterable[Piece], unit_bytes: int) -> list[WorkUnit]:
    """Pieces in order, in units of about `unit_bytes`: what can be split is, and what touches is joined again.

    Towards the end of the corpus units grow smaller, so that all cores end at about the same time.
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

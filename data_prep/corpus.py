"""Reads documents from three sources: the standard library, local or remote files, a dataset on the Hugging Face hub.

A corpus is a dataclass of its own settings. It is cut into work units, always the same ones. A unit of files lists
pieces of files, and the worker reads them; a unit of the hub contains its documents.
"""

import io
import json
import logging
import os
import platform
import sysconfig
import tokenize  # the standard library's
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from data_prep.contents import look
from data_prep.errors import DataError, headline
from data_prep.long import LONG_BYTES, LongDocument, LongRow, half_of_a_pair, not_utf8, text_pieces
from data_prep.parquet import row_groups, rows_of
from data_prep.sidecars import sifted
from data_prep.source import (
    LINES,
    PARQUET,
    TEXT,
    Document,
    FileInfo,
    Form,
    Piece,
    Rejected,
    bytes_of,
    expand,
    lines_of,
    local_file,
)
from data_prep.unit import Item, WorkUnit, grouped

ROWS_AT_ONCE = 256
LOOKS_AT_ONCE = 16  # files inspected at once; threads, because most of the time is waiting
HELD_BYTES = 256  # bytes that a row of the hub adds to its text: rejected rows have no text, but are held too
LARGEST_DOCUMENT = (1 << 31) - (1 << 20)  # bytes; the index stores a document's number of tokens as int32
LISTING_KEYS = ("files", "bytes", "listing_sha256")  # what `describe` says about the listed files
FIRST_DOCUMENTS = 1000  # if all of these are rejected, the settings are wrong


Heartbeat = Callable[[], None]  # called now and then during a long read


def no_heartbeat() -> None:
    """Does nothing, for a caller without a watchdog."""


@dataclass
class CorpusConfig(ABC):
    """The group `corpus`: one subclass per option."""

    kind: ClassVar[str]

    @abstractmethod
    def units(self, unit_bytes: int) -> Iterable[WorkUnit]:
        """Cuts the whole corpus into units, in order. Raises DataError if it cannot be read."""

    @abstractmethod
    def read(self, piece: Piece, largest: int, heartbeat: Heartbeat) -> Iterator[Item]:
        """Yields the documents of one piece in order, without empty ones; a Rejected for each that cannot be used.

        `largest`: bytes of a row, or of a file that is one document; larger ones are rejected, and are not held in
        memory. Raises DataError if the file cannot be read.
        """

    def items(self, unit: WorkUnit, largest: int, heartbeat: Heartbeat = no_heartbeat) -> Iterator[Item]:
        """Yields the documents of one unit."""
        for item in unit.documents:
            large = isinstance(item, Document) and len(item.data) > largest
            yield too_large(item.id, largest) if large else item
        for piece in unit.pieces:
            yield from self.read(piece, largest, heartbeat)

    def documents(self) -> Iterator[Document | LongDocument]:
        """Yields every document that can be used."""
        for unit in self.units(LONG_BYTES):
            yield from (item for item in self.items(unit, LARGEST_DOCUMENT) if not isinstance(item, Rejected))

    def ensure_documents(self) -> None:
        """Raises DataError if the corpus is empty, or if its first documents are all rejected (a wrong text_key)."""
        units = self.units(LONG_BYTES)
        items = (item for unit in units for item in self.items(unit, LARGEST_DOCUMENT))
        first: Rejected | None = None
        for item in islice(items, FIRST_DOCUMENTS):
            if not isinstance(item, Rejected):
                return
            first = first or item
        if first:
            raise DataError(
                f"the first documents of the corpus ({self.kind}) are all unusable: {first.id}: {first.reason}"
            )
        raise DataError(f"the corpus ({self.kind}) is empty: it has no document with text")

    def remarks(self) -> list[str]:
        """Lines that say which files are left out, and which ones are perhaps not meant to be read."""
        return []

    def describe(self) -> dict[str, Any]:
        """The settings that the documents depend on, for the manifest."""
        return {"kind": self.kind, **asdict(self)}

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: a worker does not need the list of a million files."""
        return asdict(self)


@dataclass
class StdlibCorpus(CorpusConfig):
    """The standard library of the running Python, tests included: about 30 MB of source, no network."""

    kind: ClassVar[str] = "stdlib"

    def units(self, unit_bytes: int) -> list[WorkUnit]:
        return grouped((local_file(path).whole() for path in self._paths()), unit_bytes)

    def read(self, piece: Piece, largest: int, heartbeat: Heartbeat) -> Iterator[Item]:
        name = Path(piece.path).relative_to(stdlib_root()).as_posix()
        data = bytes_of(piece.path, largest)
        if data is None:
            yield too_large(name, largest)
            return
        try:
            text = decode_source(data)
            data = text.encode()
        except (SyntaxError, ValueError) as error:  # an unknown or wrong encoding: deliberate, in test data
            yield Rejected(name, f"does not decode: {headline(error)}")
            return
        if text:
            yield Document(name, text, data)

    def describe(self) -> dict[str, Any]:
        root = stdlib_root()
        files = ((path.relative_to(root).as_posix(), path.stat().st_size) for path in self._paths())
        return {"kind": self.kind, "python": platform.python_version(), **listing(files)}

    @staticmethod
    def _paths() -> list[Path]:
        """All .py files of the standard library, without the packages that pip installed below it."""
        paths = []
        for folder, names, files in os.walk(stdlib_root()):
            names[:] = [name for name in names if name not in ("site-packages", "dist-packages")]
            paths += [Path(folder) / name for name in files if name.endswith(".py")]
        return sorted(path for path in paths if path.is_file())


@dataclass
class FilesCorpus(CorpusConfig):
    """Files: one document per row of JSON or parquet, one per file for all others. Files may be compressed."""

    kind: ClassVar[str] = "files"
    paths: list[str]  # files, globs, folders (all files below, without hidden ones) and URLs
    text_key: str = "text"  # the key or column of the text

    def units(self, unit_bytes: int) -> list[WorkUnit]:
        return grouped(self._pieces, unit_bytes)

    @cached_property
    def _files(self) -> list[FileInfo]:
        """Lists the files once: a run uses the files as they are at its start, and remote listings take time."""
        return expand(self.paths, self._chosen)

    def _chosen(self, name: str, files: list[FileInfo]) -> list[FileInfo]:
        chosen, remark = sifted(name, files)
        self._remarks.update({remark: None} if remark else {})
        return chosen

    @cached_property
    def _remarks(self) -> dict[str, None]:
        return {}

    def remarks(self) -> list[str]:
        return list(self._remarks) if self._files else []

    @cached_property
    def _pieces(self) -> list[Piece]:
        with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
            forms = list(pool.map(look, self._files))
            refused = [
                f"{file.path}: cannot be read: {form}"
                for file, form in zip(self._files, forms, strict=True)
                if isinstance(form, str)
            ]
            if refused:
                more = f" (and {len(refused) - 1:,} more files: {refused[1]} ...)" if len(refused) > 1 else ""
                raise DataError(refused[0] + more)
            return list(chain.from_iterable(pool.map(self._pieces_of, self._files, forms)))

    def _pieces_of(self, file: FileInfo, form: Form) -> list[Piece]:
        if form.kind == PARQUET:
            return row_groups(file, self.text_key)
        return [file.lines(form) if form.kind == LINES else file.whole(form)]

    def read(self, piece: Piece, largest: int, heartbeat: Heartbeat) -> Iterator[Item]:
        if piece.form.kind == PARQUET:
            return self._rows(piece, largest)
        return self._text(piece, largest) if piece.form.kind == TEXT else self._lines(piece, largest, heartbeat)

    def _lines(self, piece: Piece, largest: int, heartbeat: Heartbeat) -> Iterator[Item]:
        for offset, size, line in lines_of(piece, min(largest, LONG_BYTES), largest, heartbeat):
            name = f"{piece.path}:{offset}"
            if size > largest:
                yield too_large(name, largest)
            elif not isinstance(line, bytes):
                yield LongDocument(name, LongRow(line, self.text_key, heartbeat).pieces)
            elif not line.isspace() and (item := row_of(name, line, self.text_key)):
                yield item

    def _rows(self, piece: Piece, largest: int) -> Iterator[Item]:
        for number, data in rows_of(piece, self.text_key):
            name = f"{piece.path}:{number}"
            if data is None:
                yield Rejected(name, f"{self.text_key!r} must be text, not null")
            elif len(data) > largest:
                yield too_large(name, largest)
            elif data:
                yield decoded(name, data)

    def _text(self, piece: Piece, largest: int) -> Iterator[Item]:
        data = bytes_of(piece.path, min(largest, LONG_BYTES), piece.form.compression)
        if data is None:
            yield LongDocument(piece.path, partial(text_pieces, piece.path, piece.form.compression))
        elif data:
            yield decoded(piece.path, data)

    def describe(self) -> dict[str, Any]:
        files = listing((file.path, file.size) for file in self._files)
        return {"kind": self.kind, "paths": list(self.paths), "text_key": self.text_key, **files}


@dataclass
class HubCorpus(CorpusConfig):
    """A dataset of the Hugging Face hub, streamed."""

    kind: ClassVar[str] = "hub"
    name: str  # USER/DATASET
    config: str | None = None  # the subset, as the dataset's page names it; null: the default one
    split: str = "train"  # split to read
    text_key: str = "text"  # the column of the text
    revision: str | None = None  # a branch, tag or commit; null: the newest

    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        index, size, documents = 0, 0, list[Item]()
        for item in self._items():
            documents.append(item)
            size += HELD_BYTES + (len(item.data) if isinstance(item, Document) else 0)
            if size >= unit_bytes:
                yield WorkUnit(index, size, documents=tuple(documents))
                index, size, documents = index + 1, 0, []
        if documents:
            yield WorkUnit(index, size, documents=tuple(documents))

    def read(self, piece: Piece, largest: int, heartbeat: Heartbeat) -> Iterator[Item]:
        raise AssertionError("a unit of the hub contains its documents")

    def _items(self) -> Iterator[Item]:
        """Yields the documents of the text column. A failure inside `datasets` becomes one line that names the row."""
        where, number = f"{self.name} ({self.config or 'default'}, {self.split})", 0
        try:
            arguments = {"name": self.config, "split": self.split, "revision": self.revision}
            stream = quiet_datasets().load_dataset(self.name, streaming=True, **arguments)
            for batch in stream.iter(batch_size=ROWS_AT_ONCE):
                if self.text_key not in batch:
                    raise DataError(
                        f"{where}: no column {self.text_key!r} (corpus.text_key); it has {', '.join(batch)}"
                    )
                for value in batch[self.text_key]:
                    number += 1
                    if item := text_of(f"{where}, row {number}", value, self.text_key):
                        yield item
        except DataError:
            raise
        except Exception as error:  # each reader inside datasets raises its own errors
            place = f"{where}, after row {number}" if number else where
            raise DataError(f"{place}: {type(error).__name__}: {headline(error)}") from error


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def decode_source(data: bytes) -> str:
    """Decodes Python source by its own declaration (PEP 263), with its line ends. Raises SyntaxError or ValueError."""
    coding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(coding)


def listing(files: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Number and bytes of the files, and a digest of names and sizes: enough to detect a changed corpus."""
    count, total, digest = 0, 0, sha256()
    for name, size in files:
        count, total = count + 1, total + size
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return dict(zip(LISTING_KEYS, (count, total, digest.hexdigest()), strict=True))


def row_of(name: str, line: bytes, text_key: str) -> Item | None:
    """The document of one line of JSON; None if its text is empty."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Rejected(name, not_utf8(error))
    except json.JSONDecodeError as error:
        return Rejected(name, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # 100,000 nested brackets; an integer of 10,000 digits
        return Rejected(name, f"not JSON: {headline(error)}")
    if not isinstance(row, dict):
        return Rejected(name, f"a row must be an object, not {type(row).__name__}")
    if text_key not in row:
        return Rejected(name, f"no key {text_key!r} (corpus.text_key); it has {', '.join(map(str, row))}")
    return text_of(name, row[text_key], text_key)


def text_of(name: str, text: Any, text_key: str) -> Item | None:
    """The document of a value; None if it is empty."""
    if not isinstance(text, str):
        return Rejected(name, f"{text_key!r} must be text, not {type(text).__name__}")
    try:
        return Document(name, text, text.encode()) if text else None
    except UnicodeEncodeError:
        return Rejected(name, half_of_a_pair(text_key))


def decoded(name: str, data: bytes) -> Item:
    try:
        return Document(name, data.decode(), data)
    except UnicodeDecodeError as error:
        return Rejected(name, not_utf8(error))


def too_large(name: str, largest: int) -> Rejected:
    return Rejected(name, f"more than {largest:,} bytes (max_document_mib)")


def quiet_datasets() -> ModuleType:
    """Imports the package `datasets` on first use, without torch, log lines and progress bars."""
    os.environ.setdefault("USE_TORCH", "0")  # otherwise it imports torch: seconds and hundreds of MB for nothing
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are also raised
    datasets.disable_progress_bars()
    return datasets

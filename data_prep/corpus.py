"""Documents out of three sources: the standard library, files near or far, a dataset of the Hugging Face hub.

A corpus is the dataclass of its own settings. It is cut into units of work: a unit of files says which pieces it is,
and whoever does it reads them; a unit of the hub has its documents with it. A unit is always the same.
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
LOOKS_AT_ONCE = 16  # files whose rows are counted: footers of parquet, mostly waited for
HELD_BYTES = 256  # that a row of the hub counts for beside its text: poison has none, and is held too
LARGEST_DOCUMENT = (1 << 31) - (1 << 20)  # bytes: no more tokens than the index can say, an int32
LISTING_KEYS = ("files", "bytes", "listing_sha256")  # what the settings of a corpus of files say about the files
FIRST_DOCUMENTS = 1000  # if all of these are poison, then the settings are wrong


Heartbeat = Callable[[], None]  # called now and then within what takes long to read


def no_heartbeat() -> None:
    """Nobody waits."""


@dataclass
class CorpusConfig(ABC):
    """The group `corpus`: one subclass an option."""

    kind: ClassVar[str]

    @abstractmethod
    def units(self, unit_bytes: int) -> Iterable[WorkUnit]:
        """The whole corpus, in order. Raises DataError if it cannot be read."""

    @abstractmethod
    def read(self, piece: Piece, largest: int, heartbeat: Heartbeat) -> Iterator[Item]:
        """The documents of one piece that are not empty, in order; poison in place of those that cannot be used.

        `largest`: bytes of a row, or of a file that is one document; more is poison, and is not held in memory.
        Raises DataError if the file cannot be read.
        """

    def items(self, unit: WorkUnit, largest: int, heartbeat: Heartbeat = no_heartbeat) -> Iterator[Item]:
        """The documents of one unit."""
        for item in unit.documents:
            large = isinstance(item, Document) and len(item.data) > largest
            yield too_large(item.id, largest) if large else item
        for piece in unit.pieces:
            yield from self.read(piece, largest, heartbeat)

    def documents(self) -> Iterator[Document | LongDocument]:
        """Every document that can be used."""
        for unit in self.units(LONG_BYTES):
            yield from (item for item in self.items(unit, LARGEST_DOCUMENT) if not isinstance(item, Rejected))

    def ensure_documents(self) -> None:
        """Raises DataError if the corpus is empty, or if its first documents are all poison: a wrong text_key, say."""
        units = self.units(LONG_BYTES)
        items = (item for unit in units for item in self.items(unit, LARGEST_DOCUMENT))
        poison: Rejected | None = None
        for item in islice(items, FIRST_DOCUMENTS):
            if not isinstance(item, Rejected):
                return
            poison = poison or item
        if poison:
            raise DataError(
                f"the corpus ({self.kind}) begins with no document that can be used: {poison.id}: {poison.reason}"
            )
        raise DataError(f"the corpus ({self.kind}) is empty: it has no document with text")

    def remarks(self) -> list[str]:
        """Lines on what is left out, and on what may not be meant."""
        return []

    def describe(self) -> dict[str, Any]:
        """Settings that the documents depend on, for the manifest."""
        return {"kind": self.kind, **asdict(self)}

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: a worker has no use for a list of a million files."""
        return asdict(self)


@dataclass
class StdlibCorpus(CorpusConfig):
    """The running Python's own standard library, tests included: about 30 MB of source, and no network."""

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
        except (SyntaxError, ValueError) as error:  # an unknown coding, or not in it: test data, on purpose
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
        """All .py files, packages that pip put below the standard library left out."""
        paths = []
        for folder, names, files in os.walk(stdlib_root()):
            names[:] = [name for name in names if name not in ("site-packages", "dist-packages")]
            paths += [Path(folder) / name for name in files if name.endswith(".py")]
        return sorted(path for path in paths if path.is_file())


@dataclass
class FilesCorpus(CorpusConfig):
    """Files: a document a row of JSON and parquet, a document a file for all others; compression around them.

    `paths`: files, globs, folders (all files below, hidden ones left out) and URLs. `text_key`: the column of the
    text.
    """

    kind: ClassVar[str] = "files"
    paths: list[str]
    text_key: str = "text"

    def units(self, unit_bytes: int) -> list[WorkUnit]:
        return grouped(self._pieces, unit_bytes)

    @cached_property
    def _files(self) -> list[FileInfo]:
        """Listed once: a run is of the files as they are at its start, and far away each look takes its time."""
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
    """A dataset of the Hugging Face hub, streamed: `name` and `config` as its page says."""

    kind: ClassVar[str] = "hub"
    name: str
    config: str | None = None
    split: str = "train"
    text_key: str = "text"
    revision: str | None = None

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
        raise AssertionError("a unit of the hub has its documents with it")

    def _items(self) -> Iterator[Item]:
        """The column of texts. What fails inside `datasets` becomes one line that names the place."""
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
        except Exception as error:  # datasets raises what each of its readers raises
            place = f"{where}, after row {number}" if number else where
            raise DataError(f"{place}: {type(error).__name__}: {headline(error)}") from error


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def decode_source(data: bytes) -> str:
    """Python source by its own declaration (PEP 263), line ends as they are. SyntaxError, ValueError."""
    coding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(coding)


def listing(files: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Number, bytes and a digest of names and sizes: enough to see that a corpus has changed."""
    count, total, digest = 0, 0, sha256()
    for name, size in files:
        count, total = count + 1, total + size
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return dict(zip(LISTING_KEYS, (count, total, digest.hexdigest()), strict=True))


def row_of(name: str, line: bytes, text_key: str) -> Item | None:
    """The document of one line of JSON; None where its text is empty."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Rejected(name, not_utf8(error))
    except json.JSONDecodeError as error:
        return Rejected(name, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # a hundred thousand brackets; an integer of ten thousand digits
        return Rejected(name, f"not JSON: {headline(error)}")
    if not isinstance(row, dict):
        return Rejected(name, f"a row must be an object, not {type(row).__name__}")
    if text_key not in row:
        return Rejected(name, f"no key {text_key!r} (corpus.text_key); it has {', '.join(map(str, row))}")
    return text_of(name, row[text_key], text_key)


def text_of(name: str, text: Any, text_key: str) -> Item | None:
    """The document; None where it is empty."""
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
    """The package `datasets`, imported when first needed, without torch, log lines and bars."""
    os.environ.setdefault("USE_TORCH", "0")  # else it imports torch, seconds and hundreds of MB, for nothing
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions too
    datasets.disable_progress_bars()
    return datasets

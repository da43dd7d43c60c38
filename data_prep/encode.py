"""Encodes one work unit in a process: reads its documents, selects, tokenises and writes them.

    pieces of files ── documents, bad ones quarantined ── batches of 1 MB of text ── ids ── train-KKKKK, val-KKKKK
        └ last, the unit's record: a rerun skips units that have one

The content of a unit depends only on the corpus and the settings, so every worker writes the same bytes.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from data_prep.clean import DIGEST_BYTES, NOWHERE, CleanConfig, digest_of, place_of, sorted_digests, split_of
from data_prep.corpus import CorpusConfig
from data_prep.durable import DurableFile, durable, publish
from data_prep.encoder import Encoder
from data_prep.errors import DataError, headline
from data_prep.long import LongDocument, cut, digest_and_size
from data_prep.source import Document, Rejected
from data_prep.token_file import SPLITS, TokenFileEntry, TokenFileWriter, token_dtype, with_suffix
from data_prep.unit import Item, WorkUnit

UNFINISHED_FOLDER = "unfinished"  # in the output folder during a run: one record per unit
BATCH_BYTES = 1 << 20
READING = -1  # a worker's position while it reads or writes: that time counts for no document

T = TypeVar("T")


@dataclass(frozen=True)
class UnitRecord:
    """Record of a finished unit: its input, its token files, and what was left out."""

    index: int
    key: str  # changes if the unit's input changes
    digest: str  # of the digests of its documents
    files: tuple[TokenFileEntry, ...]
    too_short: int = 0
    too_long: int = 0
    duplicates: int = 0
    dropped: str = ""  # digest of the places of the duplicates that were dropped from the finished files
    quarantined: tuple[tuple[str, str], ...] = ()  # id and reason
    kept: bool = False  # from an earlier run

    @property
    def text_bytes(self) -> int:
        return sum(entry.text_bytes for entry in self.files)

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.files)


@dataclass(frozen=True)
class EncodeJob:
    """The settings that every worker needs."""

    folder: Path
    corpus: CorpusConfig
    clean: CleanConfig
    val_fraction: float
    largest: int  # bytes that a document may have
    gigatoken: str | None  # gigatoken's scheme, if it gives the same ids as tiktoken; else None


@dataclass(frozen=True)
class UnitStride:
    """Every `count`-th unit, from `index` on; by default all."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "UnitStride":
        """Reads "K/N". Raises DataError unless 0 <= K < N."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise DataError(f"part={text} must be K/N, 0 <= K < N")
        return cls(int(index), int(count))

    def has(self, unit: int) -> bool:
        return unit % self.count == self.index


class Watch(Protocol):
    """Records a worker's position, so that an observer sees progress, a hang, or the document of a crash."""

    def at(self, document: int) -> None: ...

    def done(self, text_bytes: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class EncodeUnit:
    """A task: encodes one unit."""

    unit: WorkUnit
    one_at_a_time: bool = False  # batches of one document, to find the one that crashed the worker
    rejected: dict[int, str] = field(default_factory=dict)  # numbers of bad documents, with the reasons

    def run(self, job: EncodeJob, encoder: Encoder, watch: Watch) -> UnitRecord:
        """Writes the unit's token files, then its record."""
        try:
            return self._run(job, encoder, watch)
        except LongDocumentFailed as error:  # half of it is written: write the unit again without it
            return replace(self, rejected={**self.rejected, error.number: error.reason}).run(job, encoder, watch)

    def _run(self, job: EncodeJob, encoder: Encoder, watch: Watch) -> UnitRecord:
        with ExitStack() as files:
            writing = UnitFiles(self.unit, job, encoder, files)
            items = watched(job.corpus.items(self.unit, job.largest, partial(watch.at, READING)), watch)
            for first, batch in batches(items, 1 if self.one_at_a_time else BATCH_BYTES):
                watch.at(first)
                known = [
                    Rejected(item.id, self.rejected[number]) if number in self.rejected else item
                    for number, item in enumerate(batch, start=first)
                ]
                if isinstance(known[0], LongDocument):
                    writing.add_long(known[0], first, watch)
                else:
                    writing.add(known)
                watch.done(writing.text_bytes, writing.tokens)
            return writing.publish()


class LongDocumentFailed(Exception):
    """The tokenizer failed on a long document after part of it was written."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason


def watched(items: Iterable[T], watch: Watch) -> Iterator[T]:
    """Yields the same items, and counts the time until each of them comes as reading."""
    watch.at(READING)
    for item in items:
        yield item
        watch.at(READING)


def batches(items: Iterator[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yields groups of about `size` bytes, each with the number of its first item. A long document is a group alone."""
    batch: list[Item] = []
    number, held = 0, 0
    for item in items:
        long = isinstance(item, LongDocument)
        if batch and (held >= size or long):
            yield number, batch
            number, batch, held = number + len(batch), [], 0
        batch.append(item)
        held += len(item.data) if isinstance(item, Document) else size if long else 1
    if batch:
        yield number, batch


class UnitFiles:
    """The growing token files of one unit."""

    def __init__(self, unit: WorkUnit, job: EncodeJob, encoder: Encoder, files: ExitStack) -> None:
        self._unit, self._job, self._encoder, self._files = unit, job, encoder, files
        self._writers: dict[str, TokenFileWriter] = {}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._kept: dict[bytes, int] = {}  # with deduplication: the place of each digest
        self._digest = blake2b(digest_size=DIGEST_BYTES)  # of the digests of all documents
        self._quarantined: list[tuple[str, str]] = []
        self._too_short = self._too_long = self._duplicates = 0

    @property
    def text_bytes(self) -> int:
        return sum(self._bytes.values())

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def add(self, batch: list[Item]) -> None:
        """Encodes and writes a batch. All records keep the documents' order, so the size of a batch changes nothing."""
        chosen = {
            number: item
            for number, item in enumerate(batch)
            if isinstance(item, Document) and self._fits(len(item.data))
        }
        digests = {number: digest_of(document.data) for number, document in chosen.items()}
        if self._job.clean.deduplicate:
            digests = {number: digest for number, digest in digests.items() if self._is_new(digest)}
        encoded = self._encoder.encode_all([chosen[number] for number in digests])
        ids_of = dict(zip(digests, encoded, strict=True))
        pieces: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for number, item in enumerate(batch):
            ids = item if isinstance(item, Rejected) else ids_of.get(number)
            if isinstance(ids, Rejected):
                self._quarantined.append((ids.id, ids.reason))
            elif ids is not None:
                split = split_of(digests[number], self._job.val_fraction)
                self._place(digests[number], split, len(pieces[split]) // 2)
                pieces[split] += [ids, self._encoder.end]
                self._bytes[split] += len(chosen[number].data)
        for split, parts in pieces.items():
            if parts:
                ends = np.cumsum([len(part) for part in parts])[1::2]
                self._writer(split).write(np.concatenate(parts), ends.tolist())

    def add_long(self, document: LongDocument, number: int, watch: Watch) -> None:
        """Encodes and writes a long document. Raises LongDocumentFailed if the tokenizer fails on it."""
        try:
            digest, size = digest_and_size(watched(document.pieces(), watch), self._job.largest)
        except DataError:
            raise
        except ValueError as error:
            self._quarantined.append((document.id, headline(error)))
            return
        if not self._fits(size) or (self._job.clean.deduplicate and not self._is_new(digest)):
            return
        split = split_of(digest, self._job.val_fraction)
        self._place(digest, split, 0)
        writer = self._writer(split)
        for text in cut(watched(document.pieces(), watch)):
            watch.at(number)
            (ids,) = self._encoder.encode_all([Document(document.id, text, text.encode())])
            if isinstance(ids, Rejected):
                raise LongDocumentFailed(number, ids.reason)
            writer.write(ids, [])
            self._bytes[split] += len(text.encode())
            watch.done(self.text_bytes, self.tokens)
        writer.write(self._encoder.end, [1])

    def _fits(self, size: int) -> bool:
        clean = self._job.clean
        short = size < clean.min_bytes
        long = clean.max_bytes is not None and size > clean.max_bytes
        self._too_short += short
        self._too_long += long
        return not short and not long

    def _is_new(self, digest: bytes) -> bool:
        """True if the unit has not had the digest yet. Also counts a document on which the tokenizer fails later."""
        if digest in self._kept:
            self._duplicates += 1
            return False
        self._kept[digest] = NOWHERE
        return True

    def _place(self, digest: bytes, split: str, ahead: int) -> None:
        """Records the document's place: after the written documents of its split and the `ahead` pending ones."""
        self._digest.update(digest)
        if self._job.clean.deduplicate:
            self._kept[digest] = place_of(split, self._documents(split) + ahead)

    def _documents(self, split: str) -> int:
        return self._writers[split].documents if split in self._writers else 0

    def _writer(self, split: str) -> TokenFileWriter:
        if split not in self._writers:
            path = self._job.folder / f"{split}-{self._unit.index:05d}"
            self._writers[split] = self._files.enter_context(TokenFileWriter(path, self._encoder.vocab_size))
        return self._writers[split]

    def publish(self) -> UnitRecord:
        """Puts the unit's files in place, last its record, which it returns."""
        tokens = [file for writer in self._writers.values() for file in writer.close()]
        record, beside = self._record(), list[DurableFile]()
        if self._job.clean.deduplicate:
            beside.append(self._file(digests_path(self._job.folder, record.index)))
            beside[-1].write(sorted_digests(self._kept).view(np.uint8).data)
        beside.append(self._file(record_path(self._job.folder, record.index)))
        beside[-1].write(format_record(record, self._encoder.vocab_size))
        publish(tokens, beside)
        return record

    def _file(self, path: Path) -> DurableFile:
        file = DurableFile(path)
        self._files.callback(file.discard)  # does nothing after publish
        return file

    def _record(self) -> UnitRecord:
        return UnitRecord(
            self._unit.index,
            self._unit.key,
            self._digest.hexdigest(),
            tuple(entry_of(split, self._writers[split], self._bytes[split]) for split in sorted(self._writers)),
            self._too_short,
            self._too_long,
            self._duplicates,
            quarantined=tuple(self._quarantined),
        )


def entry_of(split: str, writer: TokenFileWriter, text_bytes: int) -> TokenFileEntry:
    counts = writer.documents, writer.tokens, text_bytes, writer.largest_id
    return TokenFileEntry(writer.prefix.name, split, *counts, writer.sha256)


def record_path(folder: Path, index: int) -> Path:
    return folder / UNFINISHED_FOLDER / f"{index:05d}.json"


def dropped_path(folder: Path, index: int) -> Path:
    return folder / UNFINISHED_FOLDER / f"dropped-{index:05d}.json"


def digests_path(folder: Path, index: int) -> Path:
    return folder / UNFINISHED_FOLDER / f"{index:05d}.digests"


def save_record(path: Path, record: UnitRecord, vocab_size: int) -> None:
    with durable(path) as file:
        file.write(format_record(record, vocab_size))


def format_record(record: UnitRecord, vocab_size: int) -> bytes:
    return json.dumps({**asdict(record), "dtype": token_dtype(vocab_size).str}).encode()


def finished_unit(job: EncodeJob, unit: WorkUnit) -> UnitRecord | None:
    """The unit's record from an earlier run, if it has the same input and its files are complete."""
    if job.clean.deduplicate and not digests_path(job.folder, unit.index).is_file():
        return None
    for path in (dropped_path(job.folder, unit.index), record_path(job.folder, unit.index)):
        record = record_at(path, job.folder)
        if record and record.key == unit.key:
            return record
    return None


def record_at(path: Path, folder: Path) -> UnitRecord | None:
    """Reads a record; None if it is missing or unreadable, or does not match the files."""
    try:
        content = json.loads(path.read_bytes())
        dtype = np.dtype(content.pop("dtype"))
        content["files"] = tuple(TokenFileEntry(**entry) for entry in content["files"])
        content["quarantined"] = tuple((name, reason) for name, reason in content["quarantined"])
        record = UnitRecord(**{**content, "kept": True})
        for entry in record.files:
            for suffix, size in entry.sizes(dtype).items():
                if with_suffix(folder / entry.name, suffix).stat().st_size != size:
                    return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record

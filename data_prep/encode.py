"""One unit of work: its documents, read, chosen, encoded and written, in a process of its own.

    the unit's pieces ── documents, poison put aside ── batches of a megabyte of text ── ids ── train-KKKKK, val-KKKKK
        └ then the unit's record, last: a rerun does not do again what has one

What a unit holds follows from the corpus and the settings alone, so the files are the same bytes whoever does it.
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
from data_prep.durable import durable
from data_prep.encoder import Encoder
from data_prep.errors import DataError, headline
from data_prep.long import LongDocument, cut, digest_and_size
from data_prep.source import Document, Rejected
from data_prep.token_file import SPLITS, TokenFileEntry, TokenFileWriter, token_dtype, with_suffix
from data_prep.unit import Item, WorkUnit

UNFINISHED_FOLDER = "unfinished"  # inside the output folder while a run is under way: one record a unit
BATCH_BYTES = 1 << 20
READING = -1  # the place of a worker that waits for its next document, or writes: no document takes that time

T = TypeVar("T")


@dataclass(frozen=True)
class UnitRecord:
    """Record of a finished unit: what it was made of, the digest of its texts, its token files, what is not in them."""

    index: int
    key: str
    digest: str
    files: tuple[TokenFileEntry, ...]
    too_short: int = 0
    too_long: int = 0
    duplicates: int = 0
    dropped: str = ""  # digest of the places of those that were taken out of the finished files
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
    """Settings that every worker must know."""

    folder: Path
    corpus: CorpusConfig
    clean: CleanConfig
    val_fraction: float
    largest: int  # bytes of a document
    gigatoken: str | None  # the scheme, where it has been found to give the same ids


@dataclass(frozen=True)
class UnitStride:
    """Every `count`-th unit, from `index` on; by default all."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "UnitStride":
        """From "K/N". DataError unless 0 <= K < N."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise DataError(f"part={text} must be K/N, 0 <= K < N")
        return cls(int(index), int(count))

    def has(self, unit: int) -> bool:
        return unit % self.count == self.index


class Watch(Protocol):
    """Records how far a worker is, so that an observer sees progress, a stop, or the place of a crash."""

    def at(self, document: int) -> None: ...

    def done(self, text_bytes: int, tokens: int) -> None: ...


@dataclass(frozen=True)
class EncodeUnit:
    """A task: one unit. `one_at_a_time`: a document at a time, after a crash; `poison`: documents known to be it."""

    unit: WorkUnit
    one_at_a_time: bool = False
    poison: dict[int, str] = field(default_factory=dict)

    def run(self, job: EncodeJob, encoder: Encoder, watch: Watch) -> UnitRecord:
        """Write the unit's token files, then its record."""
        try:
            return self._run(job, encoder, watch)
        except LongPoison as error:  # half of it is written: once more, without it
            return replace(self, poison={**self.poison, error.number: error.reason}).run(job, encoder, watch)

    def _run(self, job: EncodeJob, encoder: Encoder, watch: Watch) -> UnitRecord:
        with ExitStack() as files:
            writing = UnitFiles(self.unit, job, encoder, files)
            items = watched(job.corpus.items(self.unit, job.largest, partial(watch.at, READING)), watch)
            for first, batch in batches(items, 1 if self.one_at_a_time else BATCH_BYTES):
                watch.at(first)
                known = [
                    Rejected(item.id, self.poison[number]) if number in self.poison else item
                    for number, item in enumerate(batch, start=first)
                ]
                if isinstance(known[0], LongDocument):
                    writing.add_long(known[0], first, watch)
                else:
                    writing.add(known)
                watch.done(writing.text_bytes, writing.tokens)
        return writing.record()


class LongPoison(Exception):
    """The tokenizer failed on a long document when part of it was written."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason


def watched(items: Iterable[T], watch: Watch) -> Iterator[T]:
    """The same, the time until each of them comes counted as reading."""
    watch.at(READING)
    for item in items:
        yield item
        watch.at(READING)


def batches(items: Iterator[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Items in groups of about `size` bytes, a long document alone; each with the number of its first."""
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
    """The token files of one unit as they grow."""

    def __init__(self, unit: WorkUnit, job: EncodeJob, encoder: Encoder, files: ExitStack) -> None:
        self._unit, self._job, self._encoder, self._files = unit, job, encoder, files
        self._writers: dict[str, TokenFileWriter] = {}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._kept: dict[bytes, int] = {}  # with deduplication: where each digest is
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
        """All that is recorded is in the order of the documents: wherever a batch ends, it comes out the same."""
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
        """LongPoison where the tokenizer fails on it."""
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
                raise LongPoison(number, ids.reason)
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
        """With deduplication. One on which the tokenizer then fails was there all the same: its copies are copies."""
        if digest in self._kept:
            self._duplicates += 1
            return False
        self._kept[digest] = NOWHERE
        return True

    def _place(self, digest: bytes, split: str, ahead: int) -> None:
        """The next document of the split but for those `ahead` of it, which are not written yet, is this one."""
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

    def record(self) -> UnitRecord:
        """Once the token files are closed."""
        if self._job.clean.deduplicate:
            with durable(digests_path(self._job.folder, self._unit.index)) as file:
                file.write(sorted_digests(self._kept).view(np.uint8).data)
        record = UnitRecord(
            self._unit.index,
            self._unit.key,
            self._digest.hexdigest(),
            tuple(entry_of(split, self._writers[split], self._bytes[split]) for split in sorted(self._writers)),
            self._too_short,
            self._too_long,
            self._duplicates,
            quarantined=tuple(self._quarantined),
        )
        save_record(record_path(self._job.folder, record.index), record, self._encoder.vocab_size)
        return record


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
        file.write(json.dumps({**asdict(record), "dtype": token_dtype(vocab_size).str}).encode())


def finished_unit(job: EncodeJob, unit: WorkUnit) -> UnitRecord | None:
    """The unit's record from an earlier run, if it is of the same input and its files are there, whole."""
    if job.clean.deduplicate and not digests_path(job.folder, unit.index).is_file():
        return None
    for path in (dropped_path(job.folder, unit.index), record_path(job.folder, unit.index)):
        record = record_at(path, job.folder)
        if record and record.key == unit.key:
            return record
    return None


def record_at(path: Path, folder: Path) -> UnitRecord | None:
    """None where it is not there, not readable, or not of the files that are."""
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

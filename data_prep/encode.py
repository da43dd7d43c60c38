"""Documents to token files: deterministic work units in a pool of processes, safe against any crash.

    documents ── units(): grouped in corpus order until a unit has `unit_bytes` of text
        └ a worker each: encode, split, write train-KKKKK and val-KKKKK, then the unit's record, last
    a rerun: a unit whose record is there, for the same texts, is not done again

What a unit holds follows from the corpus alone, so the files are the same bytes for any number of workers, and
units may be done by several machines, each its own part of them.
The parent hands over text; tokens never pass between processes.
"""

import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from hashlib import blake2b
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np

from data_prep.durable import durable
from data_prep.errors import DataError
from data_prep.token_file import (
    SPLITS,
    TOKENIZER_FOLDER,
    TokenFileEntry,
    TokenFileWriter,
    token_dtype,
    with_suffix,
)
from data_prep.tokenizer import Tokenizer

UNFINISHED_FOLDER = "unfinished"  # inside the output folder while a run is under way: one record a unit
DIGEST_BYTES = 16


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit is: its place, the digest of its texts, its token files."""

    index: int
    digest: str
    files: tuple[TokenFileEntry, ...]
    kept: bool = False  # from an earlier run

    @property
    def text_bytes(self) -> int:
        return sum(entry.text_bytes for entry in self.files)

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.files)


@dataclass(frozen=True)
class EncodeJob:
    """What every worker must know."""

    folder: Path
    val_fraction: float


@dataclass(frozen=True)
class Part:
    """Every `count`-th unit, from `index` on; by default all."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From "K/N". DataError unless 0 <= K < N."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise DataError(f"part={text} must be K/N, 0 <= K < N")
        return cls(int(index), int(count))

    def has(self, unit: int) -> bool:
        return unit % self.count == self.index


def digest_of(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def split_of(digest: bytes, val_fraction: float) -> str:
    """The split of a document, by its own text: it stays where it is when others come or go."""
    return "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train"


def units(texts: Iterable[str], unit_bytes: int) -> Iterator[list[str]]:
    """Documents in order, in groups of at least `unit_bytes` of UTF-8; the last may be smaller."""
    unit: list[str] = []
    size = 0
    for text in texts:
        unit.append(text)
        size += len(text.encode())
        if size >= unit_bytes:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def encode_corpus(
    texts: Iterable[str], job: EncodeJob, unit_bytes: int, workers: int, part: Part
) -> Iterator[UnitRecord]:
    """Encode the part's units that are not done yet; yields each one's record, in the order in which they are done.

    Holds `workers` + 1 units of text. Raises DataError when a worker dies, OSError when it cannot write: what
    is finished stays, and the next run takes it over.
    """
    context = get_context("spawn")  # threads of tokenizers and Arrow do not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    running: set[Future[UnitRecord]] = set()
    try:
        for index, unit in enumerate(units(texts, unit_bytes)):
            if not part.has(index):
                continue
            if record := finished_unit(job, index, unit):
                yield record
                continue
            running.add(pool.submit(_encode_unit, index, unit))
            if len(running) > workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise DataError(
            "a worker process died (killed, perhaps out of memory: fewer workers= or a smaller unit_mib= need"
            " less); finished units are kept, and the same command does the rest"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def record_path(folder: Path, index: int) -> Path:
    return folder / UNFINISHED_FOLDER / f"{index:05d}.json"


def finished_unit(job: EncodeJob, index: int, texts: list[str]) -> UnitRecord | None:
    """The unit's record from an earlier run, if it is of the same texts and its files are there, whole."""
    try:
        content = json.loads(record_path(job.folder, index).read_bytes())
        files = tuple(TokenFileEntry(**entry) for entry in content["files"])
        record = UnitRecord(content["index"], content["digest"], files, kept=True)
        dtype = np.dtype(content["dtype"])
        for entry in files:
            for suffix, size in entry.sizes(dtype).items():
                if with_suffix(job.folder / entry.name, suffix).stat().st_size != size:
                    return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    same_texts = record.digest == digest_of(b"".join(digest_of(text.encode()) for text in texts)).hex()
    return record if same_texts else None


_job: EncodeJob
_tokenizer: Tokenizer


def _start_worker(job: EncodeJob) -> None:
    """Once in each worker: load the tokenizer, leave Ctrl-C to the parent, and die with it."""
    global _job, _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _job, _tokenizer = job, Tokenizer.load(job.folder / TOKENIZER_FOLDER)


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])  # else the workers of a killed parent would wait for work for ever
    os._exit(1)


def _encode_unit(index: int, texts: list[str]) -> UnitRecord:
    """In a worker: write the unit's token files, then its record."""
    digests = []
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for text in texts:
        digests.append(digest_of(text.encode()))
        documents[split_of(digests[-1], _job.val_fraction)].append(text)
    files = tuple(_write(index, split, chosen) for split, chosen in documents.items() if chosen)
    record = UnitRecord(index, digest_of(b"".join(digests)).hex(), files)
    with durable(record_path(_job.folder, index)) as file:
        dtype = token_dtype(_tokenizer.vocab_size).str
        file.write(json.dumps({**asdict(record), "dtype": dtype}).encode())
    return record


def _write(index: int, split: str, texts: list[str]) -> TokenFileEntry:
    name, text_bytes = f"{split}-{index:05d}", 0
    end = np.array([_tokenizer.end_of_document], dtype=np.uint32)
    with TokenFileWriter(_job.folder / name, _tokenizer.vocab_size) as writer:
        for text in texts:
            writer.add(np.concatenate([_tokenizer.encode(text), end]))
            text_bytes += len(text.encode())
    return TokenFileEntry(name, split, writer.documents, writer.tokens, text_bytes, writer.largest_id, writer.sha256)

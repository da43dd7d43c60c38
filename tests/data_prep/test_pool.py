"""Tests documents that crash, hang or break the tokenizer; kills; and memory. Real processes."""

import gzip
import json
import os
import re
import signal
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import app, encode, pool, source, token_file
from data_prep.app import TokenizeConfig
from data_prep.clean import CleanConfig, digest_of
from data_prep.corpus import FilesCorpus, Heartbeat
from data_prep.encode import EncodeJob, EncodeUnit, UnitRecord, Watch, finished_unit
from data_prep.encoder import Encoder
from data_prep.errors import DataError
from data_prep.output import Output
from data_prep.pool import LONGEST_TICK, Clock, Pool, SharedWatch
from data_prep.source import Document, Piece, Rejected
from data_prep.token_file import Manifest, TokenFile
from data_prep.tokenizer import FileTokenizer
from data_prep.unit import Item
from data_prep.verify import verify
from tests.data_prep.commands import folder_bytes, small_spec, write_jsonl
from tests.data_prep.kills import killed_again_and_again

TEXTS = [f"good {number}" for number in range(20)]


class PanicException(BaseException):
    """A stand-in for pyo3's, which is not an Exception either."""


class TouchyEncoder(Encoder):
    def encode_all(self, documents: Sequence[Document]) -> list[np.ndarray | Rejected]:
        for document in documents:
            if document.text == "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            if document.text == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if document.text == "hang":
                time.sleep(1000)
        return super().encode_all(documents)

    def _encode(self, document: Document) -> np.ndarray | Rejected:
        return super()._encode(document._replace(text=Panic()) if document.text == "panic" else document)


class Panic(str):
    def __len__(self) -> int:
        raise PanicException("a stack overflow\nand more")


@dataclass(frozen=True)
class TouchyUnit(EncodeUnit):
    def run(self, job: EncodeJob, encoder: Encoder, watch: Watch) -> UnitRecord:
        return super().run(job, TouchyEncoder.load(job.folder, None), watch)


@dataclass
class SlowCorpus(FilesCorpus):
    """A corpus whose disk delivers nothing for a while, between two documents."""

    seconds: float = 0.0

    def read(self, piece: Piece, largest: int, heartbeat: Heartbeat) -> Iterator[Item]:
        for number, item in enumerate(super().read(piece, largest, heartbeat)):
            time.sleep(self.seconds if number == 1 else 0)
            yield item


def job_of(folder: Path, texts: list[str], seconds: float = 0) -> EncodeJob:
    path = write_jsonl(folder / "a.jsonl", texts)
    small_spec().save(folder / "out" / "tokenizer")
    (folder / "out" / "unfinished").mkdir()
    return EncodeJob(folder / "out", SlowCorpus([str(path)], seconds=seconds), CleanConfig(), 0.0, 1 << 20, None)


def encoded(folder: Path, texts: list[str], patience: float = 30, seconds: float = 0) -> list[UnitRecord]:
    """The records of a few units."""
    job = job_of(folder, texts, seconds)
    units = list(job.corpus.units((folder / "a.jsonl").stat().st_size // 2 + 1))
    with Pool(1, job, patience) as pool:
        records = list(pool.run([TouchyUnit(unit) for unit in units], lambda: None))
    assert [finished_unit(job, unit) for unit in units] == [replace(record, kept=True) for record in records]
    return records


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("panic", "the tokenizer failed: PanicException: a stack overflow"),
        ("crash", r"the tokenizer ended its process \(SIGSEGV\)"),
        ("hang", "no end after 3 s"),
    ],
)
def test_document_that_breaks_the_tokenizer_is_quarantined(tmp_path: Path, what: str, reason: str) -> None:
    records = encoded(tmp_path, [*TEXTS[:7], what, *TEXTS[7:]], patience=3)
    (found,) = [poison for record in records for poison in record.quarantined]
    assert re.fullmatch(rf"{tmp_path}/a.jsonl:\d+", found[0]) and re.fullmatch(reason, found[1])
    assert sum(entry.documents for record in records for entry in record.files) == len(TEXTS)
    assert len(TokenFile(tmp_path / "out" / "train-00000").lengths) == records[0].files[0].documents


def test_unit_is_identical_one_document_at_a_time(tmp_path: Path) -> None:
    """Compares also the quarantined documents, the counts and the digest."""
    texts = [*TEXTS, "panic", "good 3", "x", "panic", *TEXTS[:3], "good", "panic"]
    job = job_of(tmp_path, [text for text in texts for _ in range(2)])
    (unit,) = job.corpus.units(1 << 20)
    encoder, watch = Encoder.load(job.folder, None), SharedWatch([0] * 4)
    for clean in (CleanConfig(), CleanConfig(min_bytes=2, deduplicate=True)):
        found = []
        for one_at_a_time in (False, True):
            record = TouchyUnit(unit, one_at_a_time).run(replace(job, clean=clean, val_fraction=0.5), encoder, watch)
            found.append((record, folder_bytes(tmp_path / "out")))
        assert found[0] == found[1]
        assert len(record.quarantined) == (1 if clean.deduplicate else 6) and len(record.files) == 2


def test_several_bad_documents_in_one_unit_are_quarantined(tmp_path: Path) -> None:
    records = encoded(tmp_path, ["crash", *TEXTS, "panic", "crash"])
    assert len(records[0].quarantined) == 1 and sum(len(record.quarantined) for record in records) == 3


def test_slow_disk_blames_no_document_and_a_lost_one_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").mkdir()
    assert not any(record.quarantined for record in encoded(tmp_path / "slow", TEXTS, patience=1, seconds=2))
    monkeypatch.setattr(pool, "READING_SECONDS", 1.0)
    with pytest.raises(DataError, match=r"unit 0 \(.*a\.jsonl\): nothing came for 1 s; finished units are kept"):
        encoded(tmp_path, TEXTS, seconds=60)


def test_killed_worker_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a worker process was killed"):
        encoded(tmp_path, [*TEXTS, "kill"])


def test_duplicates_are_recomputed_after_a_file_was_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit that lost a duplicate is encoded again, and has a document that crashes its worker."""

    def write(number: int, *texts: str) -> None:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    def run(out: str) -> None:
        corpus = FilesCorpus([str(tmp_path / "*.gz")])
        config = TokenizeConfig(
            corpus,
            FileTokenizer(str(tmp_path / "spec")),
            out=out,
            val_fraction=0,
            unit_mib=1e-6,
            clean=CleanConfig(deduplicate=True),
            gigatoken=False,
            workers=1,
        )
        app.tokenize(config, tmp_path / out)

    def killed(self: Output, manifest: Manifest) -> None:
        raise KeyboardInterrupt

    small_spec().save(tmp_path / "spec")
    monkeypatch.setattr(app, "EncodeUnit", TouchyUnit)
    write(0, "one", "two")
    write(1, "one", "crash", "three")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "finish", killed)
        run("out")
    assert (tmp_path / "out" / "unfinished" / "dropped-00001.json").exists()
    write(0, "two", "three")
    for out in ("out", "straight"):
        run(out)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")
    assert Manifest.load(tmp_path / "out").totals()[0] == 3 and verify(tmp_path / "out") == []


class HeldWatch(SharedWatch):
    """A watch that records the memory at its last call."""

    held = 0

    def done(self, text_bytes: int, tokens: int) -> None:
        self.held = tracemalloc.get_traced_memory()[0]


def test_memory_per_document_is_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds 4 bytes per document for the index, but neither the written data nor the digests."""
    monkeypatch.setattr(encode, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(token_file, "PIECE", 1000)
    monkeypatch.setattr(source, "BLOCK_BYTES", 10_000)
    held, peak = {}, {}
    for count in (10_000, 40_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        texts = [str(number) for number in range(count)]
        job = job_of(folder, texts)
        (unit,) = job.corpus.units(1 << 30)
        encoder, watch = Encoder.load(job.folder, None), HeldWatch([0] * 4)
        tracemalloc.start()
        record = EncodeUnit(unit).run(job, encoder, watch)
        held[count], peak[count] = watch.held, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert record.digest == digest_of(b"".join(digest_of(text.encode()) for text in texts)).hex()
        lengths, (entry,) = [len(text) + 1 for text in texts], record.files
        assert TokenFile(job.folder / entry.name).document_lengths().tolist() == lengths
        assert TokenFile(job.folder / entry.name).index_faults() == []
    assert held[40_000] < held[10_000] + 8 * 30_000, held
    assert peak[40_000] < peak[10_000] + 8 * 30_000, peak


def test_output_is_identical_after_random_kills(tmp_path: Path) -> None:
    assert len(killed_again_and_again(tmp_path, kills=3, seed=int(time.time()))) == 3


def test_pause_of_the_run_blames_no_document(monkeypatch):
    """Simulates Ctrl-Z: after an hour's stop the clock has advanced by a few seconds."""
    now = [100.0]
    monkeypatch.setattr("data_prep.pool.time.monotonic", lambda: now[0])
    clock = Clock()
    for seconds in (0.5, 3600.0, 0.5):
        now[0] += seconds
        clock.tick()
    assert clock.seconds == 1.0 + LONGEST_TICK

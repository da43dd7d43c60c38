"""Tests what is left out: by length, and duplicates within a unit, across units, and of other folders."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import clean
from data_prep.clean import DIGEST, KEPT, CleanConfig, digest_of, digests_of, find_duplicates, place_of, sorted_digests
from data_prep.corpus import FilesCorpus
from data_prep.drop import DropCopies
from data_prep.encode import EncodeJob, UnitRecord, entry_of
from data_prep.encoder import Encoder
from data_prep.errors import DataError
from data_prep.pool import SharedWatch
from data_prep.token_file import Manifest, TokenFile, TokenFileEntry, TokenFileWriter
from data_prep.tokenizer import Tokenizer
from data_prep.unit import WorkUnit
from data_prep.verify import verify
from tests.data_prep.commands import (
    assert_one_error,
    folder_bytes,
    python,
    small_spec,
    texts,
    tokenize,
    tokenize_here,
    write_jsonl,
)


def documents_of(folder: Path) -> list[str]:
    """The texts of the training documents, then of the validation documents, each in order."""
    tokenizer, found = Tokenizer.load(folder / "tokenizer"), []
    for entry in Manifest.load(folder).files:
        file = TokenFile(folder / entry.name)
        texts = [tokenizer.decode(ids[:-1]) for ids in np.split(file.tokens, np.cumsum(file.lengths)[:-1])]
        assert sum(len(text.encode()) for text in texts) == entry.text_bytes
        found += texts
    return found


@pytest.fixture
def command(spec_folder: Path) -> list[str]:
    return ["corpus=files", "tokenizer=file", f"tokenizer.path={spec_folder}", "unit_mib=0.02", "workers=2"]


def test_duplicates_are_dropped_and_the_first_stays(tmp_path: Path, command: list[str]) -> None:
    once = texts(60)
    twice = [*once[:30], once[3], once[29], *once[30:], *once[50:], once[0], once[0]]
    command += [f"corpus.paths=['{write_jsonl(tmp_path / 'a.jsonl', twice)}']", "clean.deduplicate=true"]
    out = tmp_path / "out"
    done = tokenize(*command, f"out={out}")
    assert done.returncode == 0 and f"{len(twice) - 60} duplicates" in done.stdout, done
    assert verify(out) == [] and Manifest.load(out).corpus["duplicates"] == len(twice) - 60
    split = len(documents_of(out)) - sum(entry.documents for entry in Manifest.load(out).split("val"))
    found = documents_of(out)
    assert sorted(found) == sorted(once)
    assert found[:split] == [text for text in once if text in found[:split]]  # in the order of the corpus
    assert np.fromfile(out / "documents.digests", DIGEST).tolist() == halves(once)
    assert tokenize_here(*command, f"out={out}").stdout.startswith("already done")

    digests = (out / "documents.digests").read_bytes()
    flipped = digests[:8] + bytes([digests[8] ^ 1]) + digests[9:]  # in the lower half: they are still sorted
    for wrong, fault in (
        (digests[::-1], "are not sorted"),
        (flipped, "documents.digests: its sha256 does not match the manifest"),
        (digests[1:], "60 documents of the manifest have 16 each"),
    ):
        (out / "documents.digests").write_bytes(wrong)
        assert len(verify(out)) == 1 and fault in verify(out)[0]
    with pytest.raises(DataError, match=r"documents\.digests: 959 bytes are not 16 per document"):
        digests_of(str(out))
    (out / "documents.digests").write_bytes(digests)
    manifest = Manifest.load(out)
    before = {key: value for key, value in manifest.corpus.items() if key != "digests_sha256"}
    replace(manifest, corpus=before).save(out)  # an old folder: its manifest lacks the hash
    assert len(before) < len(manifest.corpus) and verify(out) == []
    manifest.save(out)

    new = texts(20, seed=1)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*once[::2], *new, new[1]]))
    command += [f"corpus.paths=['{tmp_path / 'b.jsonl'}']", f"clean.exclude=['{out}']"]
    assert tokenize(*command, f"out={tmp_path / 'other'}").returncode == 0
    assert sorted(documents_of(tmp_path / "other")) == sorted(new)
    assert np.fromfile(tmp_path / "other" / "documents.digests", DIGEST).tolist() == halves(new)


def halves(texts: list[str]) -> list[tuple[int, int]]:
    digests = [digest_of(text.encode()) for text in texts]
    return sorted((int.from_bytes(digest[:8]), int.from_bytes(digest[8:])) for digest in digests)


def test_duplicates_across_parts_are_dropped(tmp_path: Path, command: list[str]) -> None:
    once = texts(40)
    command += [f"corpus.paths=['{write_jsonl(tmp_path / 'a.jsonl', [*once, *once])}']", "clean.deduplicate=true"]
    for part in ("prepare", "1/2", "0/2"):
        assert tokenize(*command, f"out={tmp_path / 'parts'}", f"part={part}").returncode == 0
    for out in ("parts", "plain"):
        assert tokenize(*command, f"out={tmp_path / out}").returncode == 0
    assert sorted(documents_of(tmp_path / "parts")) == sorted(once)
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "plain")


def test_short_and_long_documents_are_left_out(tmp_path: Path, command: list[str]) -> None:
    rows = ["x" * length for length in (1, 4, 5, 6, 9, 10, 11)]
    command += [f"corpus.paths=['{write_jsonl(tmp_path / 'a.jsonl', rows)}']", f"out={tmp_path / 'out'}"]
    done = tokenize(*command, "clean.min_bytes=5", "clean.max_bytes=10", "val_fraction=0")
    assert done.returncode == 0 and "left out: 2 too short, 1 too long, 0 duplicates" in done.stdout
    assert documents_of(tmp_path / "out") == rows[2:6]
    assert_one_error(tokenize_here(*command), "made with other settings", "config.clean.")


def test_duplicates_match_for_any_number_of_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, paths, all_of_them = np.random.default_rng(0), [], []
    for number in range(5):
        kept = {
            digest_of(bytes([byte])): place_of("train", i)
            for i, byte in enumerate(set(random.integers(0, 256, 100).tolist()))
        }
        all_of_them += list(kept)
        paths.append(tmp_path / f"{number}.digests")
        sorted_digests(kept).tofile(paths[-1])
    results = []
    for size in (1 << 20, 400):
        monkeypatch.setattr(clean, "RANGE_BYTES", size)
        ranges = list(find_duplicates(paths, [], tmp_path / "out"))
        results.append(
            (
                sorted(zip(*(np.concatenate(c).tolist() for c in zip(*ranges, strict=True)), strict=True)),
                (tmp_path / "out").read_bytes(),
            )
        )
    assert len(ranges) > 10 and results[0] == results[1]
    assert len(results[0][0]) == len(all_of_them) - len(set(all_of_them))
    assert len(results[0][1]) == 16 * len(set(all_of_them)) and KEPT.isalignedstruct


def drop_one_of_two(folder: Path) -> int:
    """Rewrites a unit's file without the second of its two documents; returns this process's peak memory in KB."""
    job = EncodeJob(folder, FilesCorpus([]), CleanConfig(deduplicate=True), 0.0, 1 << 31, None)
    with open(folder / "entry.json") as file:
        entry = TokenFileEntry(**json.load(file))
    task = DropCopies(WorkUnit(0, 0), UnitRecord(0, "", "", (entry,)), np.array([place_of("train", 1)]))
    task.run(job, Encoder.load(folder, None), SharedWatch([0] * 4))
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def test_dropping_uses_flat_memory_for_any_document_length(tmp_path: Path) -> None:
    peak = {}
    for millions in (2, 20):
        folder = tmp_path / str(millions)
        small_spec().save(folder / "tokenizer")
        (folder / "unfinished").mkdir()
        ids = np.arange(millions * 10**6, dtype=np.uint32) % 259
        ids[-1] = 259
        text_bytes = int(small_spec().bytes_of_ids()[ids].sum())
        with TokenFileWriter(folder / "train-00000", 260) as writer:
            writer.add(ids)
            writer.add(ids)
        (folder / "entry.json").write_text(json.dumps(asdict(entry_of("train", writer, 2 * text_bytes))))
        code = "import sys, tests.data_prep.test_clean as t; print(t.drop_one_of_two(t.Path(sys.argv[1])))"
        done = python("-c", code, folder)
        assert done.returncode == 0, done
        peak[millions] = int(done.stdout)
        assert np.array_equal(TokenFile(folder / "train-00000").tokens, ids)
        (entry,) = json.loads((folder / "unfinished" / "dropped-00000.json").read_text())["files"]
        assert (entry["documents"], entry["tokens"], entry["text_bytes"]) == (1, len(ids), text_bytes)
    assert peak[20] < peak[2] + 10_000, peak

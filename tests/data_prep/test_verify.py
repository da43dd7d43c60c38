"""Tests that every fault is found and named."""

import errno
import hashlib
import io
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.faults import check
from data_prep.token_file import Manifest, TokenFileEntry, TokenFileWriter
from data_prep.tokenizer import Tokenizer
from data_prep.verify import SAMPLE_TOKENS, verify
from tests.data_prep.commands import small_spec
from tests.data_prep.folders import make_folder, write


def rewrite(folder: Path, documents: list[list[int]], name: str = "train-00000") -> None:
    """Writes other tokens, and a manifest that matches their bytes: only their meaning is wrong."""
    manifest = Manifest.load(folder)
    writer = write(folder / name, documents, manifest.vocab_size)
    lengths = small_spec().bytes_of_ids()
    text_bytes = sum(int(lengths[ids].sum()) for ids in documents)
    entry = TokenFileEntry(name, "train", writer.documents, writer.tokens, text_bytes, writer.largest_id, writer.sha256)
    files = tuple(entry if old.name == name else old for old in manifest.files)
    replace(manifest, files=files).save(folder)


def test_intact_folder_has_no_faults(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert verify(tmp_path) == []


def test_every_fault_is_reported(tmp_path: Path) -> None:
    make_folder(tmp_path)
    small_spec(("th", "the")).save(tmp_path / "tokenizer")  # another tokenizer, with one row less
    (tmp_path / "train-00000.bin").write_bytes(struct.pack("<5H", 1, 2, 259, 300, 259))
    (tmp_path / "val-00000.idx").unlink()
    (tmp_path / "train-00009.bin").write_bytes(b"")
    faults = verify(tmp_path)
    assert len(faults) == len(set(faults)) == 7
    for fault in [
        "another tokenizer",
        "259 rows, but the manifest says 260",
        "train-00000.bin: its sha256",
        "largest id 300, but the manifest says 259",
        "id 300 must be below vocab_size 260",
        "val-00000.idx is missing",
        "train-00009.bin is not in the manifest",
    ]:
        assert any(fault in line for line in faults)


def test_wrong_counts_are_faults(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][0]["documents"] = 3
    content["files"][1]["text_bytes"] = 4
    path.write_text(json.dumps(content))
    faults = verify(tmp_path)
    assert any("2 documents and 5 tokens, but the manifest says 3" in fault for fault in faults)
    assert any("val-00000.bin: 3 bytes of text, but the manifest says 4" in fault for fault in faults)


def test_wrong_offsets_are_a_fault(tmp_path: Path) -> None:
    make_folder(tmp_path)
    index = bytearray((tmp_path / "train-00000.idx").read_bytes())
    index[34:38] = struct.pack("<i", 2)
    (tmp_path / "train-00000.idx").write_bytes(index)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["files"][0]["sha256"][".idx"] = hashlib.sha256(index).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert verify(tmp_path) == [f"{tmp_path / 'train-00000.idx'}: the offsets do not match the lengths"]


def test_uint16_ids_under_a_large_tokenizer_are_a_fault(tmp_path: Path) -> None:
    """Finds narrowed ids, or a folder of mixed files, before a token is read."""
    make_folder(tmp_path)
    spec = small_spec()
    wide = replace(spec, special_tokens={"<|endoftext|>": 99_999})
    wide.save(tmp_path / "tokenizer")
    replace(Manifest.load(tmp_path), tokenizer_fingerprint=wide.fingerprint, vocab_size=100_000).save(tmp_path)
    with pytest.raises(ValueError, match=r"ids of uint16, but a tokenizer of 100000 rows needs int32"):
        check(tmp_path)
    assert sum("ids of uint16" in fault for fault in verify(tmp_path)) == 2


def test_files_of_two_tokenizers_are_a_fault(tmp_path: Path) -> None:
    """Finds a foreign file at the start of a training if it is added, by its hash if it replaces another file, and by
    its text if the hash is replaced, too.
    """
    make_folder(tmp_path)
    write(tmp_path / "train-00001", [[1, 2, 259]])
    with pytest.raises(ValueError, match=r"train-00001\.bin is not in the manifest: .* another tokenizer"):
        check(tmp_path)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train-00001{suffix}").unlink()
    rewrite(tmp_path, [[116, 104, 101, 259]] * 3)  # "the" as three bytes, although this tokenizer has a row for it
    (fault,) = verify(tmp_path)
    assert "document 0 encodes to other ids (3 of 3 sampled do): they were made with another tokenizer" in fault


def test_document_without_an_end_is_a_fault(tmp_path: Path) -> None:
    make_folder(tmp_path)
    rewrite(tmp_path, [[1, 2, 259], [1, 2]])
    assert any("1 documents do not end with id 259" in fault for fault in verify(tmp_path))


def test_long_document_is_sampled_at_its_start(tmp_path: Path) -> None:
    make_folder(tmp_path)
    ids = Tokenizer(small_spec()).encode("the Zürich 东京 " * SAMPLE_TOKENS).tolist()
    rewrite(tmp_path, [[*ids, 259]])
    assert verify(tmp_path) == []


@pytest.mark.parametrize("break_it", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_other_checks_run_without_a_tokenizer(tmp_path: Path, break_it: Callable[[Path], object]) -> None:
    make_folder(tmp_path)
    break_it(tmp_path / "tokenizer" / "spec.json")
    (tmp_path / "train-00000.bin").write_bytes(np.array([1, 2, 259, 3, 300], np.uint16).tobytes())
    faults = verify(tmp_path)
    assert len(faults) == 4 and "spec.json" in faults[0] and "sha256" in faults[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", "8192", "vocab_size must be int, not str"),
        ("corpus", None, "corpus must be dict, not NoneType"),
        ("sha256", None, "sha256 must be dict, not NoneType"),
        ("tokens", "5", "tokens must be int, not str"),
        ("config", {"clean": []}, "config.clean must be dict, not list"),
        ("sha256", {}, "train-00000: sha256 must have .bin and .idx, not none"),
        ("sha256", {".bin": "0"}, "train-00000: sha256 must have .bin and .idx, not .bin"),
        ("sha256", {".bin": "0", ".idx": "0", ".txt": "0"}, "not .bin, .idx, .txt"),
        ("split", "test", "train-00000: split 'test' must be one of train, val"),
        ("name", "val-00000", "val-00000 must be in files only once"),
        ("name", "./val-00000", "name './val-00000' must be a file in the folder itself"),
    ],
)
def test_malformed_manifest_is_a_fault(tmp_path: Path, key: str, value: object, message: str) -> None:
    make_folder(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (content if key in content else content["files"][0])[key] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    (fault,) = verify(tmp_path)
    assert "manifest.json is not a manifest" in fault and message in fault
    with pytest.raises(ValueError, match=re.escape(message)):
        check(tmp_path)


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Makes opening a file fail as on a bad disk; permission bits do not stop root."""

    def fails(where: object, *arguments: Any, **options: Any) -> Any:
        if str(where) == str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(where, *arguments, **options)

    opened = io.open
    for place in ("builtins.open", "io.open"):
        monkeypatch.setattr(place, fails)


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "train-00000.idx", "tokenizer/spec.json", "tokenizer/ranks.tiktoken", "manifest.json"]
)
def test_unreadable_file_is_one_fault_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "val-00000.bin").write_bytes(struct.pack("<5H", 1, 2, 259, 4, 259))
    unreadable(monkeypatch, tmp_path / name)
    faults = verify(tmp_path)
    assert f"{tmp_path / name} cannot be read: Input/output error" in faults
    assert any("val-00000.bin: its sha256" in fault for fault in faults) or name == "manifest.json"
    assert len(faults) == (1 if name == "manifest.json" else 2)


def test_manifest_with_more_rows_than_the_tokenizer_is_a_fault(tmp_path: Path) -> None:
    make_folder(tmp_path)
    rewrite(tmp_path, [[1, 2, 259]])
    write(tmp_path / "train-00000", [[300, 259]])
    replace(Manifest.load(tmp_path), vocab_size=400).save(tmp_path)
    assert any("260 rows, but the manifest says 400" in fault for fault in verify(tmp_path))


def test_missing_manifest_is_the_only_fault(tmp_path: Path) -> None:
    with TokenFileWriter(tmp_path / "train-00000", 1000) as writer:
        writer.add(np.array([1]))
    (fault,) = verify(tmp_path)
    assert "has .bin files, but manifest.json is missing" in fault

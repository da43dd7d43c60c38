"""Tests the format: byte for byte, read and written by Megatron, and every fault found."""

import importlib
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.faults import check
from data_prep.token_file import (
    CODES,
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    Manifest,
    TokenFile,
    TokenFileWriter,
    index_bytes,
    token_dtype,
)
from data_prep.tokenizer_spec import TokenizerSpec
from data_prep.verify import verify
from tests.data_prep.commands import small_spec
from tests.data_prep.folders import make_folder, write


def test_layout_matches_megatron_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    assert (tmp_path / "a.idx").read_bytes() == b"".join(
        [
            b"MMIDIDX\x00\x00",
            struct.pack("<QBQQ", 1, 8, 3, 4),
            struct.pack("<3i", 3, 1, 2),
            struct.pack("<3q", 0, 6, 8),
            struct.pack("<4q", 0, 1, 2, 3),
        ]
    )


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99_999), min_size=1, max_size=20), max_size=10),
    vocab_size=st.sampled_from([100_000, 65_499]),
)
def test_written_files_are_read_back(
    documents: list[list[int]], vocab_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = [[id % vocab_size for id in ids] for ids in documents]
    prefix = tmp_path_factory.mktemp("round") / "a.b"
    write(prefix, documents, vocab_size)
    file = TokenFile(prefix)
    assert file.tokens.tolist() == [id for ids in documents for id in ids]
    assert file.lengths.tolist() == [len(ids) for ids in documents]
    assert file.documents == len(documents) and file.index_faults() == []
    assert TokenFile(prefix.with_name("a.b.idx")).prefix == prefix


def test_uint16_limit_matches_megatron(tmp_path: Path) -> None:
    assert token_dtype(65_499) == np.uint16 and token_dtype(65_500) == np.int32
    write(tmp_path / "narrow", [[65_498]], 65_499)
    write(tmp_path / "wide", [[65_499]], 65_500)
    assert TokenFile(tmp_path / "narrow").tokens.tolist() == [65_498]
    assert TokenFile(tmp_path / "wide").tokens.tolist() == [65_499]


@pytest.mark.parametrize("ids", [[65_536], [-1], [1000], []])
def test_wrong_id_leaves_no_file(tmp_path: Path, ids: list[int]) -> None:
    with (
        pytest.raises(ValueError, match="must"),
        TokenFileWriter(tmp_path / "a", 1000) as writer,
    ):
        writer.add(np.array([1, 2]))
        writer.add(np.array(ids, dtype=np.int64))
    assert list(tmp_path.iterdir()) == []


def test_error_in_the_block_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TokenFileWriter(tmp_path / "a", 1000) as writer:
        writer.add(np.array([1, 2]))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_megatron_reads_ours(tmp_path: Path) -> None:
    indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    for vocab_size in (1000, 100_000):
        prefix, documents = tmp_path / str(vocab_size), [[1, 2, 3], [4], [vocab_size - 1, 6]]
        write(prefix, documents, vocab_size)
        theirs = indexed_dataset.IndexedDataset(str(prefix))
        assert [ids.tolist() for ids in theirs] == documents
        assert theirs.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_reads_megatron_files(tmp_path: Path, dtype: type) -> None:
    indexed_dataset = importlib.import_module("megatron.core.datasets.indexed_dataset")
    torch = importlib.import_module("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4]), [3, 1])  # one document of two sequences
    builder.add_item(torch.tensor([5, 200]))
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    file = TokenFile(tmp_path / "a")
    assert file.dtype == dtype and file.tokens.tolist() == [1, 2, 3, 4, 5, 200]
    assert file.lengths.tolist() == [3, 1, 2] and file.documents == 2 and file.index_faults() == []


def test_all_megatron_dtypes_are_known() -> None:
    names = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]
    assert {code: dtype.name for code, dtype in DTYPES.items()} == dict(enumerate(names, start=1))


def test_damaged_pairs_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "a"
    write(prefix, [[1, 2, 3], [4]])
    index, tokens = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()
    for suffix, content, rule in [
        (".idx", index[:-1], "header says"),
        (".idx", index[:20], "header alone"),
        (".idx", b"X" + index[1:], "magic"),
        (".idx", index[:9] + b"\x02" + index[10:], "version 2"),
        (".idx", index[:17] + b"\x09" + index[18:], "dtype code 9"),
        (".idx", index[:17] + b"\x07" + index[18:], "ids must be integers, not float32"),
        (".idx", index[:38] + struct.pack("<i", 2) + index[42:], "index says"),
        (".bin", tokens[:-2], "index says"),
        (".bin", tokens + b"12", "index says"),
    ]:
        (tmp_path / "a.idx").write_bytes(index)
        (tmp_path / "a.bin").write_bytes(tokens)
        (tmp_path / f"a{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rule):
            TokenFile(prefix)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ValueError, match=r"a\.bin is missing"):
        TokenFile(prefix)


def test_faulty_index_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4], [5]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[34:42] = struct.pack("<2i", 2, 2)  # the size is right, the offsets are wrong
    index[-8:] = struct.pack("<q", 7)
    (tmp_path / "a.idx").write_bytes(index)
    faults = TokenFile(tmp_path / "a").index_faults()
    assert len(faults) == 2 and "offsets" in faults[0] and "documents" in faults[1]


def test_opening_time_does_not_depend_on_documents(tmp_path: Path) -> None:
    documents = 100_000_000
    with open(tmp_path / "a.bin", "wb") as tokens, open(tmp_path / "a.idx", "wb") as index:
        tokens.truncate(2 * documents)
        index.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        index.truncate(index_bytes(documents, documents))  # sparse: only the last length is set
        for place, number in ((HEADER.size + 4 * documents - 4, "<i"), (HEADER.size + 12 * documents - 8, "<q")):
            index.seek(place)
            index.write(struct.pack(number, 1 if number == "<i" else 2 * documents - 2))
    start = time.perf_counter()
    file = TokenFile(tmp_path / "a")
    assert time.perf_counter() - start < 0.05 and len(file.tokens) == documents
    assert TokenFile(tmp_path / "a").document_at(5)[1] == 5  # reads only what it bisects


@settings(max_examples=30, deadline=None)
@given(documents=st.lists(st.integers(1, 9), min_size=1, max_size=20), piece=st.integers(1, 13))
def test_pieces_write_the_same_file(documents: list[int], piece: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, ids, ends = tmp_path_factory.mktemp("pieces"), np.arange(sum(documents)), np.cumsum(documents)
    write(folder / "whole", np.split(ids, ends[:-1]))
    with TokenFileWriter(folder / "pieces", 1000) as writer:
        for low in range(0, len(ids), piece):
            writer.write(ids[low : low + piece], [end - low for end in ends.tolist() if low < end <= low + piece])
    for suffix in (".bin", ".idx"):
        assert (folder / f"whole{suffix}").read_bytes() == (folder / f"pieces{suffix}").read_bytes()
    with pytest.raises(ValueError, match="no end"), TokenFileWriter(folder / "open", 1000) as writer:
        writer.write(ids, [])


@settings(deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=8),
    name=st.sampled_from(["u1", "<u2", "<i4", "<i8"]),
)
def test_places_of_documents_match_plain_search(
    documents: list[list[int]], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Documents have any number of sequences of any length, also none; most often one, as in our files."""
    prefix, dtype = tmp_path_factory.mktemp("places") / "a", np.dtype(name)
    lengths = np.array([length for document in documents for length in document], "<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8")
    firsts = np.cumsum([0, *map(len, documents)]).astype("<i8")
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], len(lengths), len(firsts))
    parts = lengths, pointers * dtype.itemsize, firsts
    prefix.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    prefix.with_suffix(".bin").write_bytes(bytes(int(lengths.sum()) * dtype.itemsize))
    file, sizes = TokenFile(prefix), [sum(document) for document in documents]
    assert file.index_faults() == [] and file.document_lengths().tolist() == sizes
    ends = np.cumsum(sizes).tolist()
    begins = [end - size for end, size in zip(ends, sizes, strict=True)]
    assert [file.document_start(i) for i in range(len(sizes) + 1)] == [*begins, file.size]
    for start in range(file.size + 1):
        for stop in range(start, file.size + 1):
            assert file.document_starts(start, stop) == sorted({at for at in begins if start <= at < stop})


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = make_folder(tmp_path)
    assert Manifest.load(tmp_path) == manifest == check(tmp_path)
    assert [entry.name for entry in manifest.split("val")] == ["val-00000"]
    assert verify(tmp_path) == []
    with pytest.raises(ValueError, match="must be one of train, val"):
        manifest.split("test")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 1}', '{"format_version": 9}'])
def test_bad_manifest_raises_data_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        check(tmp_path)
    assert len(verify(tmp_path)) == 1


def test_missing_manifest_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no token files; make them"):
        check(tmp_path)


def test_check_finds_missing_and_truncated_files(tmp_path: Path) -> None:
    make_folder(tmp_path)
    content = (tmp_path / "val-00000.bin").read_bytes()
    (tmp_path / "val-00000.bin").write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"val-00000\.bin: 8 bytes, but the manifest says 10"):
        check(tmp_path)
    (tmp_path / "val-00000.bin").unlink()
    with pytest.raises(ValueError, match=r"val-00000\.bin is missing"):
        check(tmp_path)


def test_check_finds_another_tokenizer(tmp_path: Path) -> None:
    make_folder(tmp_path)
    small_spec(("th", "the", "a ")).save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="another tokenizer"):
        check(tmp_path)
    (tmp_path / "tokenizer" / "spec.json").unlink()
    with pytest.raises(ValueError, match=r"spec\.json is missing"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "manifest.json", "tokenizer/spec.json", "tokenizer/ranks.tiktoken"])
def test_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a", [[1, 2, 3]])
    small_spec().save(tmp_path / "tokenizer")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(DataError, match=f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        if name.startswith("a."):
            TokenFile(tmp_path / "a")
        elif name == "manifest.json":
            Manifest.load(tmp_path)
        else:
            TokenizerSpec.load(tmp_path / "tokenizer")

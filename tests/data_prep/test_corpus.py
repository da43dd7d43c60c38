"""Tests the three sources: documents, their order, and errors that name the place."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import pickle
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus import CorpusConfig, FilesCorpus, HubCorpus, StdlibCorpus, decode_source
from data_prep.encoder import resident_bytes
from data_prep.errors import DataError
from data_prep.long import LongDocument
from data_prep.parquet import bytes_of, is_text, row_groups, rows_of
from data_prep.source import Document, Rejected, compression_of, expand, kind_of, local_file
from data_prep.unit import Item
from tests.data_prep.commands import assert_one_error, tokenize_here, write_jsonl


def documents(*paths: Path | str, text_key: str = "text") -> list[str]:
    corpus = FilesCorpus([str(path) for path in paths], text_key)
    return [document.text for document in corpus.documents() if isinstance(document, Document)]


def items(corpus: CorpusConfig, unit_bytes: int = 1 << 20, largest: int = 1 << 20) -> list[Item]:
    return [item for unit in corpus.units(unit_bytes) for item in corpus.items(unit, largest)]


def write_parquet(path: Path, **columns: Sequence[object]) -> Path:
    pyarrow = importlib.import_module("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def zstd(data: bytes) -> bytes:
    pyarrow = importlib.import_module("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def test_rows_and_files_are_documents(tmp_path: Path) -> None:
    rows = ["2020-01-01", "b\r\nc\u2028d", "", "東京\n", "e"]
    assert documents(write_jsonl(tmp_path / "a[1].jsonl", rows)) == [row for row in rows if row]
    assert documents(write_parquet(tmp_path / "a[1].parquet", text=rows, other=[*range(5)])) == [
        row for row in rows if row
    ]
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "empty.md").write_bytes(b"")
    assert documents(tmp_path / "a.txt", tmp_path / "empty.md") == ["one\r\ntwo\n"]


def test_rows_of_several_batches_keep_their_order(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(2500)]
    assert documents(write_jsonl(tmp_path / "a.jsonl", rows)) == rows
    assert documents(write_parquet(tmp_path / "a.parquet", text=list(rows))) == rows


def test_text_key_chooses_the_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x"], text=["y"])
    assert documents(path, text_key="body") == ["x"]


def test_globs_and_folders_list_each_file_once_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", ".e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert documents(tmp_path / "b.txt", tmp_path) == ["b.txt", "a.txt", "sub/c.txt"]
    assert documents(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    with pytest.raises(ValueError, match=r"nothing\*' matches no file"):
        expand([str(tmp_path / "nothing*")])
    with pytest.raises(ValueError, match="at least one"):
        expand([])


def test_suffixes_are_case_insensitive(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "B.JSONL", ["one", "two"]).read_bytes()
    (tmp_path / "C.Json.GZ").write_bytes(gzip.compress(rows))
    (tmp_path / "D.TXT.ZST").write_bytes(zstd(b"three"))
    write_parquet(tmp_path / "E.PARQUET", text=["four"])
    assert documents(tmp_path) == ["one", "two", "one", "two", "three", "four"]


BAD_DOCUMENTS: dict[str, tuple[str, bytes, str, str]] = {
    "text": ("a.txt", b"fine\nna\xefve", "a.txt", r"not UTF-8 \(byte 0xef after 7 bytes\)"),
    "json bytes": ("a.jsonl", b'{"text":"ok"}\n\n{"text":"\xff"}\n', "a.jsonl:15", "not UTF-8"),
    "surrogate": ("a.jsonl", b'{"text":"ok"}\n{"text":"\\ud800"}\n', "a.jsonl:14", "'text' is not UTF-8: half of"),
    "control": (
        "a.jsonl",
        b'{"text":"a\tb"}\n{"text":"ok"}\n',
        "a.jsonl:0",
        "not JSON: Invalid control character at column 11$",
    ),
    "cut": (
        "a.jsonl",
        b'{"text":"ok"}\n{"text":"a',
        "a.jsonl:14",
        "not JSON: Unterminated string starting at column 9$",
    ),
    "json": ("a.jsonl", b'\n{"text":"ok"}\n{"text":\n', "a.jsonl:15", "not JSON: Expecting value at column"),
    "deep": ("a.jsonl", b"[" * 200_000 + b"\n", "a.jsonl:0", "not JSON: "),
    "no key": ("a.jsonl", b'{"body":"ok"}\n', "a.jsonl:0", "no key 'text' .* it has body"),
    "no text": ("a.jsonl", b'{"text":null}\n', "a.jsonl:0", "'text' must be text, not NoneType"),
    "array in lines": ("a.jsonl", b'["a"]\n{"text":"ok"}', "a.jsonl:0", "a row must be an object, not list"),
    "large row": ("a.jsonl", b'{"text":"' + b"x" * (1 << 20) + b'"}\n', "a.jsonl:0", r"more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_document_is_rejected_and_the_next_is_read(tmp_path: Path, case: str) -> None:
    name, content, where, reason = BAD_DOCUMENTS[case]
    (tmp_path / name).write_bytes(content)
    found = [item for item in items(FilesCorpus([str(tmp_path / name)])) if isinstance(item, Rejected)]
    assert [item.id for item in found] == [str(tmp_path / where)]
    assert re.match(reason, found[0].reason)
    if name.endswith("l"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'\n{"text":"next"}')
        assert documents(tmp_path / name)[-1] == "next"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"no", r"a\.parquet: cannot be read: ArrowInvalid"),
        ("a.jsonl.gz", b"no", r"a\.jsonl\.gz: cannot be read"),
        ("b.jsonl.zst", zstd(b'{"text": "one"}\n' * 1000)[:-3], r"b\.jsonl\.zst: cannot be read: .* Truncated"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / name)


def test_bad_parquet_column_is_named(tmp_path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text' .* it has body"):
        documents(write_parquet(tmp_path / "a.parquet", body=["x"]))
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' .* must be text, not int64"):
        documents(write_parquet(tmp_path / "a.parquet", text=[1]))
    raw = pyarrow.array([b"ok", b"\xff", None])
    buffers = raw.buffers()
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    path = write_parquet(tmp_path / "a.parquet", text=text)
    assert items(FilesCorpus([str(path)])) == [
        Document(f"{path}:0", "ok", b"ok"),
        Rejected(f"{path}:1", "not UTF-8 (byte 0xff after 0 bytes)"),
        Rejected(f"{path}:2", "'text' must be text, not null"),
    ]


def test_views_of_text_and_dictionaries_are_read(tmp_path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    for kind in (pyarrow.string_view(), pyarrow.binary_view(), pyarrow.large_string(), pyarrow.large_binary()):
        text = [b"one", "東京".encode()] if "binary" in str(kind) else ["one", "東京"]
        values = pyarrow.array([*text, None], kind)
        path = write_parquet(tmp_path / f"{kind}.parquet", text=values)
        assert documents(path) == ["one", "東京"]
        words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([1, None, 0, 1]), values)
        assert is_text(words.type)
        assert bytes_of(words).to_pylist() == ["東京".encode(), None, b"one", "東京".encode()]
    words = pyarrow.array(["one", "東京"], pyarrow.large_string()).dictionary_encode()
    assert documents(write_parquet(tmp_path / "dictionary.parquet", text=words)) == ["one", "東京"]
    bad = write_parquet(tmp_path / "bad.parquet", text=pyarrow.array([b"ok", b"\xff"], pyarrow.binary_view()))
    assert [type(item) for item in items(FilesCorpus([str(bad)]))] == [Document, Rejected]
    assert not is_text(pyarrow.list_(pyarrow.string_view())) and not is_text(pyarrow.list_view(pyarrow.string()))


def test_duplicate_columns_are_named(tmp_path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns are called 'text' \(corpus.text_key\)"):
        documents(tmp_path / "a.parquet")


def test_column_of_lists_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[["a"], ["b"]])
    with pytest.raises(ValueError, match=r"column 'text' .* must be text, not list"):
        documents(path)
    pyarrow = importlib.import_module("pyarrow")
    words = pyarrow.array(["x", "x", "y"]).dictionary_encode()
    assert documents(write_parquet(tmp_path / "b.parquet", text=words)) == ["x", "x", "y"]


def test_parquet_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    """Uses one row group of 64 MB: memory holds neither its bytes in the file nor 256 of its rows."""
    pyarrow = importlib.import_module("pyarrow")
    from pyarrow import parquet

    rows = [np.random.default_rng(number).bytes(1 << 20) for number in range(64)]
    table, pages = pyarrow.table({"text": rows}), {"use_dictionary": False, "write_batch_size": 1}
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", **pages)
    (piece,) = row_groups(local_file(tmp_path / "a.parquet"), "text")
    del rows, table
    pyarrow.default_memory_pool().release_unused()
    before, peak, count = resident_bytes(), 0, 0
    for _, data in rows_of(piece, "text"):
        count += data is not None
        peak = max(peak, resident_bytes())
    assert count == 64 and peak - before < 40 << 20


def test_files_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus_module, times = importlib.import_module("data_prep.corpus"), list[list[str]]()
    monkeypatch.setattr(corpus_module, "expand", lambda paths, *more: times.append(paths) or expand(paths, *more))
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    corpus = FilesCorpus([str(path)])
    corpus.describe()
    corpus.ensure_documents()
    units = corpus.units(10)
    path.unlink()
    assert corpus.units(10) == units and len(times) == 1
    assert vars(pickle.loads(pickle.dumps(corpus))) == {"paths": [str(path)], "text_key": "text"}


@pytest.mark.parametrize("suffix", ["", "?download=true&x=a.b", "#top.txt"])
def test_suffix_of_a_web_address_ignores_the_query(suffix: str) -> None:
    for name, compression in (("a.jsonl.gz", "gzip"), ("a.jsonl", None)):
        path = f"https://somewhere/{name}{suffix}"
        assert (kind_of(path), compression_of(path)) == (".jsonl", compression)
    assert kind_of("a?b.txt") == ".txt" and kind_of("a.jsonl#1.txt") == ".txt"


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 1000, 1 << 20])
def test_units_of_a_file_hold_each_row_once(tmp_path: Path, unit_bytes: int) -> None:
    """Cuts ranges at every place: inside a row, at its first byte, at its last byte, and ranges without a row start."""
    rows = [f"row {number} " + "x" * (number % 97) for number in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = FilesCorpus([str(path), str(write_jsonl(tmp_path / "b.jsonl", ["last"]))])
    units = corpus.units(unit_bytes)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert sum(unit.size for unit in units) == path.stat().st_size + (tmp_path / "b.jsonl").stat().st_size
    assert all(unit.size <= unit_bytes for unit in units)
    found = items(corpus, unit_bytes)
    assert [item[1] for item in found] == [*rows, "last"]
    offsets = [int(item.id.rpartition(":")[2]) for item in found[:-1]]
    assert all(path.read_bytes()[offset : offset + 1] == b"{" for offset in offsets)


def test_units_of_parquet_are_row_groups(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[f"row {number}" for number in range(11)])
    corpus = FilesCorpus([str(path)])
    pieces = [unit.pieces for unit in corpus.units(8 * 150)]
    assert [(p[0].start, p[0].stop) for p in pieces] == [(0, 2), (2, 4), (4, 6)] and all(len(p) == 1 for p in pieces)
    assert [item.id for item in items(corpus, 1)] == [f"{path}:{number}" for number in range(11)]


def packed(suffix: str, data: bytes) -> bytes:
    pyarrow = importlib.import_module("pyarrow")
    if suffix in (".br", ".lz4"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, {".br": "brotli", ".lz4": "lz4"}[suffix]) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    packers = {".gz": gzip.compress, ".gzip": gzip.compress, ".bz2": bz2.compress, ".zst": zstd, ".zstd": zstd}
    return {**packers, ".xz": lzma.compress, ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE)}[suffix](data)


COMPRESSED = [".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".br"]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files_match_plain_files(tmp_path: Path, suffix: str) -> None:
    def pack(data: bytes) -> bytes:
        return packed(suffix, data)

    rows = write_jsonl(tmp_path / "a.jsonl", ["one", "東京", "three"]).read_bytes()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(
        pack(rows) + pack(rows)
    )  # two frames, as parallel compressors write them
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"whole\nfile"))
    assert documents(tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}") == [
        *["one", "東京", "three"] * 2,
        "whole\nfile",
    ]
    corpus = FilesCorpus([str(tmp_path / f"a.jsonl{suffix}")])
    assert len(corpus.units(1)) == 1  # cannot be split


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_truncated_compressed_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    lines = np.random.default_rng(0).bytes(300_000).hex().encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed(suffix, b'{"text": "' + lines + b'"}')[:-20])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: cannot be read"):
        documents(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_bytes_after_a_compressed_stream_are_an_error(tmp_path: Path, suffix: str) -> None:
    """Zeros after a stream are padding; any other byte is an error, not an end."""
    one = packed(suffix, b'{"text": "one"}\n')
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(one + bytes(512) + one + bytes(512))
    assert documents(path) == ["one", "one"]
    path.write_bytes(one + b"junk")
    with pytest.raises(DataError, match="cannot be read"):
        documents(path)


ROWS = [{"text": f'a "row" {number} [1] }}{{ \\ 東京', "meta": [{"text": "no"}, {}, []]} for number in range(99)]
LAYOUTS = {
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "array over lines": "[" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(row, indent="\t") for row in ROWS),
    "objects in one line": "".join(map(json.dumps, ROWS)),
    "objects and commas": ",\r\n".join(map(json.dumps, ROWS)),
    "two arrays": json.dumps(ROWS[:7]) + "\n" + json.dumps(ROWS[7:]),
    "empty array first": "[]\n" + json.dumps(ROWS),
}


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_json_in_any_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, block: int) -> None:
    monkeypatch.setattr(importlib.import_module("data_prep.source"), "BLOCK_BYTES", block)
    data = (b"\xef\xbb\xbf" if block > 3 else b"") + LAYOUTS[layout].encode()
    (tmp_path / "a.json").write_bytes(data)
    expected = [row["text"] for row in ROWS]
    corpus = FilesCorpus([str(tmp_path / "a.json")])
    found = items(corpus, 100)
    assert [item[1] for item in found] == expected and len(corpus.units(100)) == 1
    starts = [data[int(item.id.rpartition(":")[2]) :][:1] for item in found]
    assert set(starts) == {b"{"}


def test_large_and_bad_array_elements_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps([{"text": "x" * 500}, None, 1.5, "words", {"body": 1}, {"text": "y" * 5000}, {"text": "z"}])
    )
    monkeypatch.setattr(importlib.import_module("data_prep.corpus"), "LONG_BYTES", 100)
    first, *bad, large, last = items(FilesCorpus([str(path)]), largest=1000)
    assert isinstance(first, LongDocument) and "".join(first.pieces()) == "x" * 500
    assert [type(item) for item in bad] == [Rejected] * 4 and isinstance(last, Document)
    assert isinstance(large, Rejected) and large.reason.startswith("more than 1,000 bytes")


@pytest.mark.parametrize(
    "text", ['[{"text": "a"}, {"te', '[{"text": "a"},', '[{"text": "a"}', '[{"text": "a"}, oops]', "[{}]}"]
)
def test_broken_array_stops_the_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    write_jsonl(tmp_path / "b.jsonl", ["fine"])
    with pytest.raises(DataError, match=r"a\.json: cannot be read: .*not JSON"):
        documents(tmp_path)


@pytest.mark.parametrize("first", [b'{"text": "cut, ', b'{"text": "a", ', b"# a comment", b'{"text": ["a",'])
def test_bad_first_row_is_rejected_and_the_others_are_read(tmp_path: Path, first: bytes) -> None:
    """A bad first row is not mistaken for a row over several lines."""
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "a.jsonl").write_bytes(first + b"\n" + (tmp_path / "a.jsonl").read_bytes())
    bad, *good = items(FilesCorpus([str(tmp_path / "a.jsonl")]))
    assert isinstance(bad, Rejected) and [item[1] for item in good] == ["one", "two"]


def test_large_rows_over_several_lines_are_read(tmp_path: Path) -> None:
    """The first row ends after the bytes that are inspected."""
    rows = [{"text": letter * 100_000, "n": [1]} for letter in "ab"]
    (tmp_path / "a.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert documents(tmp_path / "a.json") == [row["text"] for row in rows]


def archive(name: str) -> bytes:
    sink = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(sink, "w") as file:
            file.writestr("a.jsonl", '{"text": "one"}')
        return sink.getvalue()
    kind = tarfile.USTAR_FORMAT if "old" not in name else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        info = tarfile.TarInfo("a.jsonl")
        info.size = 15
        tar.addfile(info, io.BytesIO(b'{"text": "one"}'))
    return sink.getvalue()


TAR, ZIP = archive("a.tar"), archive("a.zip")
BINARY = np.random.default_rng(1).bytes(3000)
REFUSED = {
    "a.tar": (TAR, "a tar archive: unpack it"),
    "renamed.jsonl": (TAR, "a tar archive"),
    "a.tar.gz": (gzip.compress(TAR), "gzip around a tar archive"),
    "a.tgz": (gzip.compress(TAR), "gzip around a tar archive"),
    "a.tar.xz": (lzma.compress(TAR), "xz around a tar archive"),
    "no_suffix": (zstd(TAR), "zstd around a tar archive"),
    "a.zip": (ZIP, "a zip archive"),
    "b.txt": (ZIP, "a zip archive"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" + BINARY, "a 7z archive"),
    "a.txt.gz.gz": (gzip.compress(gzip.compress(b"text")), "compressed twice"),
    "a.json.gz": (b'{"text": "plain"}', "its name says gzip, but its content is not gzip"),
    "a.arrow": (b"ARROW1\0\0" + BINARY, "an Arrow"),
    "a.orc": (b"ORC" + BINARY, "an ORC file: convert it"),
    "a.pkl": (pickle.dumps(["text"]), "a pickle"),
    "a.npy": (b"\x93NUMPY\x01\0" + BINARY, "a NumPy array"),
    "a.pdf": (b"%PDF-1.7\n" + BINARY, "a PDF"),
    "a.msgpack": (BINARY, "binary data, not text"),
    "a.txt": ("UTF-16 text".encode("utf-16"), "UTF-16 text: convert it with `iconv"),
    "without_mark.jsonl": ('{"text": "one"}'.encode("utf-16-le"), "binary data, not text"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "page.jsonl": (b"<html>\n<body>\nnot found\n", "named .jsonl, but none of its first 3 lines is a JSON object"),
    "words.json": (b'["one", "two"]', "an array whose elements are not objects"),
    "b.parquet.gz": (gzip.compress(b"PAR1" + BINARY), "Parquet within gzip"),
}


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_files_are_refused_before_any_work(tmp_path: Path, name: str, far: bool) -> None:
    """A file is refused for its content, alone and beside other files."""
    content, words = REFUSED[name]
    write_jsonl(tmp_path / "0.jsonl", ["fine"])
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=re.escape(f"{name}: cannot be read: {words}")):
            FilesCorpus([f"file://{path}" if far else str(path)]).units(1 << 20)


def test_content_overrides_the_suffix(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows", ["one", "two"]).read_bytes()
    for name, content in (("gz.jsonl", gzip.compress(rows)), ("xz.jsonl.gz", lzma.compress(rows))):
        (tmp_path / name).write_bytes(content)
        assert documents(tmp_path / name) == ["one", "two"]
    (tmp_path / "text").write_bytes(bz2.compress(b"BZh and more"))
    (tmp_path / "BZh.txt").write_bytes(b"BZh and more")
    assert documents(tmp_path / "text", tmp_path / "BZh.txt") == ["BZh and more"] * 2
    for name in ("p.json", "p", "p.txt"):
        write_parquet(tmp_path / name, text=["row"])
        assert documents(tmp_path / name) == ["row"]


def test_refused_command_writes_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "a.jsonl", ["one", "two"])
    for name in ("b.tar", "c.zip"):
        (data / name).write_bytes(archive(name))
    done = tokenize_here(
        "corpus=files", f"corpus.paths=[{data}]", "tokenizer.vocab_size=257", f"out={tmp_path / 'out'}"
    )
    assert_one_error(done, "b.tar: cannot be read: a tar archive", "and 1 more file", "c.zip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("far", [False, True])
def test_sidecar_files_are_left_out_and_reported(tmp_path: Path, far: bool) -> None:
    snapshot = tmp_path / "test_snapshot"
    sidecars = ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes", "data/_SUCCESS", "data/.a.crc")
    sidecars += ("data/train-0.jsonl.md5", "SHA256SUMS", "data/_metadata")
    for name in ("data/train-0.jsonl", "data/test-0.jsonl", "data/latest.jsonl", "validation/x.jsonl", *sidecars):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(snapshot / name, [name])
    corpus = FilesCorpus([f"file://{snapshot}" if far else str(snapshot)])
    texts = [item[1] for item in items(corpus)]
    assert texts == ["data/latest.jsonl", "data/test-0.jsonl", "data/train-0.jsonl", "validation/x.jsonl"]
    (line,) = corpus.remarks()
    assert line.startswith(corpus.paths[0])
    for part in ("2 checksums", "2 markers", "2 dot files", "1 data set description", "2 cards or licences"):
        assert part in line
    assert "read too: data/test-0.jsonl, validation/x.jsonl (" in line
    assert documents(snapshot / "README.md", snapshot / "data" / "train-0.jsonl") == [
        '{"id": 0, "text": "README.md"}\n',
        "data/train-0.jsonl",
    ]


def test_sidecar_names_are_read_if_there_are_no_rows(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", "sub/README.md", "a.txt", "a.txt.md5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = FilesCorpus([str(tmp_path)])
    assert [item[1] for item in items(corpus)] == ["LICENSE", "README.md", "a.txt", "sub/README.md"]
    assert corpus.remarks() == [f"{tmp_path}: left out: 1 checksum"]
    assert documents(tmp_path / "*.md5") == ["a.txt.md5"]


def test_remote_files_match_local_files(tmp_path: Path) -> None:
    """Reads fsspec's `file:`, which takes the same code path as s3 and http, without a network."""
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    write_parquet(tmp_path / "b.parquet", text=["three"])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"four"))
    for name in (f"file://{tmp_path}", f"file://{tmp_path}/*", f"file://{tmp_path}/[abc].*"):
        corpus = FilesCorpus([name])
        assert [item.text for item in items(corpus, 10) if isinstance(item, Document)] == [
            "one",
            "two",
            "three",
            "four",
        ]
        assert len(corpus.units(10)) > 4 and corpus.describe()["files"] == 3
    with pytest.raises(ValueError, match="matches no file"):
        expand([f"file://{tmp_path}/nothing*"])
    with pytest.raises(ValueError, match="nosuch://x: cannot be read: ValueError: Protocol not known: nosuch"):
        expand(["nosuch://x"])


def test_changed_files_change_the_description(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    corpus = FilesCorpus([str(path)])
    before = corpus.describe()
    assert before == corpus.describe() and before["bytes"] == 3
    path.write_text("three")
    assert FilesCorpus([str(path)]).describe() != before


def test_python_source_is_decoded_by_its_declaration() -> None:
    assert decode_source("# é\r\n".encode()) == "# é\r\n"
    assert decode_source(b"\xef\xbb\xbfx") == "x"
    assert decode_source(b"# coding: latin-1\n# \xe9") == "# coding: latin-1\n# é"
    for wrong in (b"\xff", b"# coding: nonsense\n"):
        with pytest.raises((SyntaxError, ValueError)):
            decode_source(wrong)


def test_stdlib_corpus_is_read() -> None:
    corpus = StdlibCorpus()
    found = items(corpus)
    size = sum(len(item.data) for item in found if isinstance(item, Document))
    expected = corpus.describe()["bytes"]
    assert len(found) > 500 and size > 10e6 and abs(size - expected) < 0.01 * size
    assert all("site-packages" not in item.id and item.id.endswith(".py") for item in found)
    assert sum(isinstance(item, Rejected) for item in found) < 20


def test_rejected_rows_count_towards_the_unit_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubCorpus, "_items", lambda self: (Rejected(str(number), "no") for number in range(1000)))
    assert max(len(unit.documents) for unit in HubCorpus("x").units(10_000)) < 50


def test_hub_dataset_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads a local folder, which `datasets` accepts as a name: everything except the download."""
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "train-00000.parquet", body=["x", "", "y"], id=[1, 2, 3])
    assert [document[1] for document in HubCorpus(str(tmp_path), text_key="body").documents()] == ["x", "y"]
    with pytest.raises(ValueError, match=r"no column 'text' .* it has body, id"):
        items(HubCorpus(str(tmp_path)))
    with pytest.raises(ValueError, match="nosplit"):
        items(HubCorpus(str(tmp_path), split="nosplit"))

"""Tests documents that are not held in memory: their ids match the whole text, wherever they are cut."""

import gzip
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import corpus, long, source
from data_prep.app import TokenizeConfig, training_texts
from data_prep.clean import digest_of
from data_prep.corpus import FilesCorpus, no_heartbeat
from data_prep.errors import DataError
from data_prep.long import LongDocument, LongRow, cut, digest_and_size
from data_prep.source import Document, Rejected
from data_prep.token_file import Manifest, TokenFile
from data_prep.tokenizer import BpeTokenizer, Tokenizer
from data_prep.tokenizer_spec import TokenizerSpec
from data_prep.verify import verify
from tests.data_prep.commands import python, small_spec, texts, tokenize

TEXT = 'a "quoted" \\ back\\\\slash \n\t é 东京 🙂 \\ud83d \\\\ud83d\\ude42 \u2028 \x7f end ' * 40


@pytest.fixture(params=[1, 2, 3, 7, 64, 1 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(source, "BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("ascii_only", [True, False])
def test_long_row_matches_short_row(block: int, ascii_only: bool) -> None:
    row = {
        "n": -1.5e3,
        "none": [None, 0, float("nan")],
        "meta": {"text": ["no", {"x": 'b"]}'}], "": None},
        "ok": True,
        "text": TEXT,
        "more": [1],
    }
    line = json.dumps(row, ensure_ascii=ascii_only).encode()
    pieces = list(LongRow(io.BytesIO(b"\xef\xbb\xbf" + line + b"\n"), "text", no_heartbeat).pieces())
    assert "".join(pieces) == TEXT and (len(pieces) > 10 or block > 7)
    assert all(piece.encode() for piece in pieces)  # raises on half a surrogate pair


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 7}', "'text' must be text"),
        (b'{"body": "x"}', "no key 'text'"),
        (b"{}", "no key 'text'"),
        (b"[1]", "a row must be an object"),
        (b'{"text": "x', "not JSON"),
        (b'{"a": [1, "x', "not JSON"),
        (b'{"text": "\\q 0123456789abcdef"}', "not JSON"),
        (b'{"text": "\\u12x4 0123456789abcdef"}', "not JSON"),
        (b'{"text": "a\nb"}', "Invalid control character"),
        (b'{"text" "x"}', "no colon"),
        (b'{"a": tru e, "text": "x"}', "'tru' is not a value"),
        (b'{"a": [01], "text": "x"}', "'01' is not a value"),
        (b'{"a": [1[2]], "text": "x"}', "'1[2' is not a value"),
        (b'{"a": [1\xe6', "not UTF-8 (byte 0xe6 after 8 bytes)"),
        (b'{"a": {"b": "\t"}, "text": "x"}', "Invalid control character"),
        (b'{"a": ["\\u12g4567890123"], "text": "x"}', "a wrong escape"),
        (b'{"a": [[[[[[]]]]]]], "text": "x"}', "no comma after a value"),
        (b'{"a": 1, b: 2, "text": "x"}', "'b' instead of a key"),
        (b'{"text": "x", b: 2}', "'b' instead of a key"),
        (b'{"text": "x",}', "a comma before the end"),
        (b'{"text": "x" "b": 2}', "no comma after a value"),
        (b'{"text": "x"} {"text": "y"}', "something follows the object"),
        (b'{"text": "x", "b": [1', "it ends too early"),
        (b'{"text": "x", "text": null}', "'text' must be text"),
        (b'{"a": [' + b"1" * 5000 + b'], "text": "x"}', "is not a value"),
        (b'{"a": , "text": "x"}', "',' is not a value"),
        (b'{"a": ' + b"1" * 5000 + b', "text": "x"}', "is not a value"),
        (b'{"text": "\\ud800 alone"}', "'text' is not UTF-8: half of a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 0xff after 10 bytes)"),
    ],
)
def test_bad_long_row_names_the_fault(block: int, line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        digest_and_size(LongRow(io.BytesIO(line), "text", no_heartbeat).pieces(), 1 << 20)


words = st.text(st.sampled_from('text"\\[]{},: \n\u2028é🙂1'), max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(words, values, max_size=5),
    words,
    words,
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:  ")]),
    st.sampled_from([1, 2, 3, 5, 11, 40, 1 << 20]),
    st.integers(0, 12),
)
def test_long_rows_match_json_for_any_blocks(
    members: dict[str, object], key: str, text: str, ascii_only: bool, marks: tuple[str, str], block: int, deep: int
) -> None:
    """Puts any JSON values before the text, at any depth, and ends blocks at any place."""
    nested: object = list(members.values())
    for _ in range(deep):
        nested = [nested, {key: nested}] if deep < 5 else [nested]
    line = json.dumps({**members, "deep": nested, key: text}, ensure_ascii=ascii_only, separators=marks).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "BLOCK_BYTES", block)
        assert "".join(LongRow(io.BytesIO(line), key, no_heartbeat).pieces()) == text


def test_escaped_keys_are_found(block: int) -> None:
    line = rb'{"te\u0078u": 1, "t\/ext": {"text": 2}, "\ud83d\ude43": 3, "te\u0078t": "x", "\ud83d\uDE42": "y"}'
    for key, text in (("text", "x"), ("🙂", "y")):
        assert "".join(LongRow(io.BytesIO(line), key, no_heartbeat).pieces()) == text


REPEATED_KEYS = [
    rb'{"text": "first", "text": "last"}',
    rb'{"text": null, "n": [1, {"text": "inner"}], "text": "last"}',
    rb'{"text": "a", "t\u0065xt": "b\ud83d\ude42", "x": 1, "te\u0078t" : "last", "y": "\""}',
    rb'{"te\u0078t": "first", "text": ""}',
    rb'{"text": "first", "text": ["no text"]}',
]


@pytest.mark.parametrize("row", REPEATED_KEYS)
def test_last_of_repeated_keys_counts_in_short_and_long_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(row + b"\n")
    expected = json.loads(row)["text"]

    def found() -> list[str]:
        files = FilesCorpus([str(tmp_path / "a.jsonl")])
        pieces = [
            document.pieces() if isinstance(document, LongDocument) else [document.text]
            for document in files.documents()
        ]
        try:
            return [text for text in map("".join, pieces) if text]
        except ValueError as error:
            assert "must be text" in str(error)
            return []

    short = found()
    monkeypatch.setattr(corpus, "LONG_BYTES", 10)
    assert short == found() == ([expected] if isinstance(expected, str) and expected else [])


def test_reasons_are_the_same_for_short_and_long_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [rb'{"text": "half \ud83d"}', b'{"text": "\xe9"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    files = FilesCorpus([str(tmp_path / "a.jsonl")])
    (unit,) = files.units(1 << 20)
    short = [item.reason for item in files.items(unit, 1 << 20) if isinstance(item, Rejected)]
    monkeypatch.setattr(corpus, "LONG_BYTES", 4)
    long_rows = [item for item in files.items(unit, 1 << 20) if isinstance(item, LongDocument)]
    assert len(short) == len(long_rows) == 2
    for reason, document in zip(short, long_rows, strict=True):
        with pytest.raises(ValueError, match=re.escape(reason)):
            digest_and_size(document.pieces(), 1 << 20)


def test_heartbeat_is_called_before_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expects one heartbeat per block before the first piece of text."""
    monkeypatch.setattr(corpus, "LONG_BYTES", 1000)
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    row = {"numbers": list(range(10_000)), **{f"key{number}": number for number in range(3000)}, "text": "x"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    files, beats = FilesCorpus([str(path)]), list[int]()
    (unit,) = files.units(1 << 20)
    (document,) = files.items(unit, 1 << 20, lambda: beats.append(1))
    assert isinstance(document, LongDocument)
    beats.clear()
    assert next(document.pieces()) == "x" and len(beats) >= path.stat().st_size // 1000 > 80


def test_cuts_do_not_change_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "PIECE_CHARACTERS", 100)
    spec, samples = small_spec(), [*texts(5), "def f(x):\n    return x\n\n\nclass A:\n\tpass\r\n" * 50, "one two " * 90]
    for pattern in ("gpt2", "cl100k"):
        tokenizer = Tokenizer(TokenizerSpec("x", long_pattern(pattern), spec.special_tokens, spec.ranks))
        for text in samples:
            pieces = list(cut(text[start : start + 120] for start in range(0, len(text), 120)))
            assert "".join(pieces) == text and len(pieces) > 3
            assert np.array_equal(np.concatenate([tokenizer.encode(piece) for piece in pieces]), tokenizer.encode(text))
    assert [len(piece) for piece in cut(iter(["x" * 350]))] == [350]
    assert "".join(cut(iter(["x" * 70] * 5))) == "x" * 350


def long_pattern(name: str) -> str:
    from data_prep.bpe import PATTERNS

    return PATTERNS[name]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.zst"])
def test_digest_of_a_long_document_matches_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import pyarrow

    text = "".join(texts(20))
    data = text.encode() if "txt" in name else b'{"text":"short"}\n' + json.dumps({"text": text}).encode() + b"\n"
    data = gzip.compress(data) if name.endswith("gz") else data
    data = pyarrow.compress(data, codec="zstd", asbytes=True) if name.endswith("zst") else data
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(corpus, "LONG_BYTES", 1000)
    found = list(FilesCorpus([str(tmp_path / name)]).documents())
    document = found[-1]
    assert isinstance(document, LongDocument) and (len(found) == 1 or isinstance(found[0], Document))
    assert digest_and_size(document.pieces(), 1 << 20) == (digest_of(text.encode()), len(text.encode()))
    with pytest.raises(ValueError, match="more than 9 bytes"):
        digest_and_size(document.pieces(), 9)
    (unit,) = FilesCorpus([str(tmp_path / name)]).units(1 << 20)
    if "jsonl" in name:
        assert isinstance(list(FilesCorpus([str(tmp_path / name)]).items(unit, 2000))[-1], Rejected)


def test_compressed_file_of_long_rows_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = texts(5)
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    monkeypatch.setattr(corpus, "LONG_BYTES", 100)
    opened, times = source.opened, list[str]()
    monkeypatch.setattr(source, "opened", lambda path, *more: times.append(path) or opened(path, *more))
    found = list(FilesCorpus([str(tmp_path / "a.jsonl.gz")]).documents())
    for _ in range(2):
        assert ["".join(document.pieces()) for document in found if isinstance(document, LongDocument)] == rows
    assert len(times) == 1


def test_truncated_file_stops_tokenizer_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quarantining the document instead would give another tokenizer."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(1 << 20).hex().encode())[:-1000])
    monkeypatch.setattr(corpus, "LONG_BYTES", 1000)
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    config = TokenizeConfig(FilesCorpus([str(tmp_path / "a.txt.gz")]), BpeTokenizer(), out="x")
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read"):
        list(training_texts(config))


def write_long(path: Path, megabytes: int) -> Iterator[str]:
    """Writes one row, or one file, with the given megabytes of lines."""
    lines = "".join(f"line {number} of the text, and the \U0001f642\n" for number in range(25_000))
    with open(path, "w", encoding="utf-8") as file:
        row = path.suffix == ".jsonl"
        file.write('{"text": "' if row else "")
        for _ in range(megabytes):
            file.write(json.dumps(lines)[1:-1] if row else lines)
            yield lines
        file.write('"}\n' if row else "")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_is_flat_for_large_documents(tmp_path: Path, spec_folder: Path, suffix: str) -> None:
    """Compares a document of 9 MB with one of 33 MB: the largest process has the same size."""
    peak = {}
    for megabytes in (9, 33):
        path = tmp_path / f"{megabytes}{suffix}"
        size = sum(len(lines.encode()) for lines in write_long(path, megabytes))
        out = tmp_path / f"out{megabytes}{suffix}"
        code = (
            "import resource, runpy, sys\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        script = "data_prep/tokenize.py"
        command = ["corpus=files", f"corpus.paths=['{path}']", "tokenizer=file", f"tokenizer.path={spec_folder}"]
        command += ["val_fraction=0", "workers=1", f"out={out}"]
        done = python("-c", f"import sys; sys.argv[0] = {script!r}\n" + code, *command)
        assert Manifest.load(out).totals()[::2] == (1, size), done
        peak[megabytes] = int(done.stdout.rpartition("peak ")[2])
        assert verify(out) == []
        (entry,) = Manifest.load(out).files
        assert TokenFile(out / entry.name).lengths.tolist() == [entry.tokens]
    assert peak[33] < peak[9] + 20_000, peak  # KB


def test_tokenizer_trains_on_one_long_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert sum(1 for _ in write_long(path, 9)) == 9
    command = ["corpus=files", f"corpus.paths=['{path}']", "tokenizer.vocab_size=300", "tokenizer.sample_mib=0.1"]
    done = tokenize(*command, "val_fraction=0", f"out={tmp_path / 'out'}")
    assert done.returncode == 0 and "1 documents" in done.stdout, done

"""The three sources: what a document is, in what order, and which errors name which place."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.corpus import FilesCorpus, HubCorpus, StdlibCorpus, decode_source, expand
from tests.data_prep.commands import write_jsonl


def documents(*paths: Path | str, text_key: str = "text") -> list[str]:
    return list(FilesCorpus([str(path) for path in paths], text_key).documents([]))


def write_parquet(path: Path, **columns: Sequence[object]) -> Path:
    pyarrow = importlib.import_module("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_a_row_or_a_file_is_a_document(tmp_path: Path) -> None:
    rows = ["2020-01-01", "b\r\nc\u2028d", "", "東京\n", "e"]
    assert documents(write_jsonl(tmp_path / "a[1].jsonl", rows)) == [row for row in rows if row]
    assert documents(write_parquet(tmp_path / "a[1].parquet", text=rows, other=[*range(5)])) == [
        row for row in rows if row
    ]
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "empty.md").write_bytes(b"")
    assert documents(tmp_path / "a.txt", tmp_path / "empty.md") == ["one\r\ntwo\n"]


def test_more_rows_than_one_batch(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(2500)]
    assert documents(write_jsonl(tmp_path / "a.jsonl", rows)) == rows
    assert documents(write_parquet(tmp_path / "a.parquet", text=list(rows))) == rows


def test_another_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x"], text=["y"])
    assert documents(path, text_key="body") == ["x"]


def test_globs_and_folders_in_order_each_once(tmp_path: Path) -> None:
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


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "text": ("a.txt", b"fine\nna\xefve", r"a\.txt, line 2: not UTF-8 \(byte 0xef at column 3\)"),
    "json bytes": ("a.jsonl", b'{"text":"ok"}\n\n{"text":"\xff"}\n', r"a\.jsonl, line 3: not UTF-8"),
    "surrogate": ("a.jsonl", b'{"text":"ok"}\n{"text":"\\ud800"}\n', r"line 2: 'text' is not UTF-8"),
    "json": ("a.jsonl", b'\n{"text":"ok"}\n{"text":\n', r"line 3: not JSON"),
    "no key": ("a.jsonl", b'{"body":"ok"}\n', r"line 1: no key 'text' .* it has body"),
    "no text": ("a.jsonl", b'{"text":null}\n', r"line 1: 'text' must be text, not NoneType"),
    "array": ("a.json", b'[{"text":"a"}]', r"line 1: a row must be an object, not list"),
    "no parquet": ("a.parquet", b"no", r"a\.parquet: not a parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / name)


def test_a_bad_parquet_column_is_named(tmp_path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text' .* it has body"):
        documents(write_parquet(tmp_path / "a.parquet", body=["x"]))
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: 'text' must be text, not NoneType"):
        documents(write_parquet(tmp_path / "a.parquet", text=["x", None]))
    raw = pyarrow.array([b"ok", b"\xff"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    with pytest.raises(ValueError, match=r"a\.parquet: .* not UTF-8"):
        documents(write_parquet(tmp_path / "a.parquet", text=text))


def test_a_change_of_the_files_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    corpus = FilesCorpus([str(path)])
    before = corpus.describe()
    assert before == corpus.describe() and corpus.text_bytes() == 3
    path.write_text("three")
    assert corpus.describe() != before


def test_source_by_its_own_declaration() -> None:
    assert decode_source("# é\r\n".encode()) == "# é\r\n"
    assert decode_source(b"\xef\xbb\xbfx") == "x"
    assert decode_source(b"# coding: latin-1\n# \xe9") == "# coding: latin-1\n# é"
    for wrong in (b"\xff", b"# coding: nonsense\n"):
        with pytest.raises((SyntaxError, ValueError)):
            decode_source(wrong)


def test_the_standard_library() -> None:
    corpus, skipped = StdlibCorpus(), list[str]()
    texts = list(corpus.documents(skipped))
    size = sum(len(text.encode()) for text in texts)
    assert len(texts) > 500 and size > 10e6 and abs(size - corpus.text_bytes()) < 0.01 * size
    assert all("site-packages" not in str(path) for path in corpus._paths())
    assert len(skipped) < 20 and all(name.endswith(".py") for name in skipped)


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a local folder of data files for a name: the whole road but the download."""
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "train-00000.parquet", body=["x", "", "y"], id=[1, 2, 3])
    assert list(HubCorpus(str(tmp_path), text_key="body").documents([])) == ["x", "y"]
    with pytest.raises(ValueError, match=r"no column 'text' .* it has body, id"):
        list(HubCorpus(str(tmp_path)).documents([]))
    with pytest.raises(ValueError, match="nosplit"):
        list(HubCorpus(str(tmp_path), split="nosplit").documents([]))

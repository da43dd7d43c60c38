"""Tests the output folder between two runs: which run may continue, and what a killed run leaves."""

from pathlib import Path
from typing import Any

import pytest

from data_prep import app
from data_prep.app import TokenizeConfig
from data_prep.corpus import FilesCorpus, StdlibCorpus
from data_prep.durable import shared
from data_prep.errors import DataError
from data_prep.output import Output
from data_prep.token_file import Manifest
from data_prep.tokenizer import FileTokenizer
from tests.data_prep.commands import small_spec
from tests.data_prep.folders import make_folder


def output(folder: Path, corpus: FilesCorpus, from_corpus: bool = False) -> Output:
    settings: dict[str, Any] = {"corpus": corpus.describe(), "config": {}}
    return Output(folder, settings, tokenizer_from_corpus=from_corpus)


def test_unfinished_folder_accepts_a_repaired_file_but_not_another_column(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": "a"')
    with output(out, FilesCorpus([str(path)])).started():
        (out / "train-00000.bin").touch()  # otherwise the folder would be left as it was found
    path.write_text('{"text": "a"}')
    assert output(out, FilesCorpus([str(path)])).finished() is None
    with pytest.raises(DataError, match=r'corpus\.text_key is "text" there, "body" now'):
        output(out, FilesCorpus([str(path)], text_key="body")).finished()
    with pytest.raises(DataError, match=r"corpus\.bytes is 12 there, 13 now"):
        output(out, FilesCorpus([str(path)]), from_corpus=True).finished()


def test_leftovers_of_a_run_killed_after_its_manifest_are_removed(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "unfinished").mkdir()
    done = Output(tmp_path, {"corpus": {}, "config": {}}, tokenizer_from_corpus=False)
    with shared(tmp_path / "unfinished" / "lock", "busy"):  # held by the run that is about to remove it
        assert done.finished() == Manifest.load(tmp_path) and (tmp_path / "unfinished").exists()
    assert done.finished() == Manifest.load(tmp_path) and not (tmp_path / "unfinished").exists()


def test_partial_files_of_ended_workers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    out = tmp_path / "out"
    with pytest.raises(OSError, match="full"), output(out, FilesCorpus([str(tmp_path / "a.txt")])).started():
        (out / "train-00000.bin").touch()
        (out / "unfinished" / "00001.json.tmp-host-7").touch()
        raise OSError("full")
    names = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert names == ["lock", "settings.json", "train-00000.bin"]


@pytest.mark.parametrize("key", ["verify", "stats", "out"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_error_mentions_kept_units_only_if_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, error: BaseException
) -> None:
    def fails(*arguments: object) -> None:
        raise error

    for name in ("verify", "write_statistics", "tokenize"):
        monkeypatch.setattr(app, name, fails)
    config = TokenizeConfig(StdlibCorpus(), FileTokenizer("nowhere"), **{key: str(tmp_path)})
    message, code = ("error: interrupted", 130) if isinstance(error, KeyboardInterrupt) else (f"error: {error}", 2)
    assert app.execute(config) == code and capsys.readouterr().err == f"{message}\n"
    (tmp_path / "unfinished").mkdir()
    remark = "; finished units are kept, the same command continues" if key == "out" else ""
    assert app.execute(config) == code and capsys.readouterr().err == f"{message}{remark}\n"


@pytest.mark.parametrize("out", ["file/out", "/proc/out", "x" * 300])
def test_impossible_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text")
    small_spec().save(tmp_path / "spec")
    assert app.execute(TokenizeConfig(FilesCorpus(["file"]), FileTokenizer("spec"), out=out)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and out in line and "kept" not in line

"""The output folder between two runs: which one may go on in it, and what a killed one leaves."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.corpus import FilesCorpus
from data_prep.durable import shared
from data_prep.errors import DataError
from data_prep.output import Output
from data_prep.token_file import Manifest
from tests.data_prep.folders import make_folder


def output(folder: Path, corpus: FilesCorpus, from_corpus: bool = False) -> Output:
    settings: dict[str, Any] = {"corpus": corpus.describe(), "config": {}}
    return Output(folder, settings, tokenizer_from_corpus=from_corpus)


def test_an_unfinished_folder_goes_on_with_a_mended_file_but_not_with_another_column(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": "a"')
    with output(out, FilesCorpus([str(path)])).started():
        (out / "train-00000.bin").touch()  # else it would be left as it was found
    path.write_text('{"text": "a"}')
    assert output(out, FilesCorpus([str(path)])).finished() is None
    with pytest.raises(DataError, match=r'corpus\.text_key is "text" there, "body" now'):
        output(out, FilesCorpus([str(path)], text_key="body")).finished()
    with pytest.raises(DataError, match=r"corpus\.bytes is 12 there, 13 now"):
        output(out, FilesCorpus([str(path)]), from_corpus=True).finished()


def test_what_is_left_by_a_run_that_was_killed_after_its_manifest_goes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "unfinished").mkdir()
    done = Output(tmp_path, {"corpus": {}, "config": {}}, tokenizer_from_corpus=False)
    with shared(tmp_path / "unfinished" / "lock", "busy"):  # by the run that is about to do it
        assert done.finished() == Manifest.load(tmp_path) and (tmp_path / "unfinished").exists()
    assert done.finished() == Manifest.load(tmp_path) and not (tmp_path / "unfinished").exists()


def test_what_ended_workers_have_left_half_written_goes_with_the_run_that_fails(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    out = tmp_path / "out"
    with pytest.raises(OSError, match="full"), output(out, FilesCorpus([str(tmp_path / "a.txt")])).started():
        (out / "train-00000.bin").touch()
        (out / "unfinished" / "00001.json.tmp-host-7").touch()
        raise OSError("full")
    names = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert names == ["lock", "settings.json", "train-00000.bin"]

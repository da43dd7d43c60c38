"""Tests the numbers on the statistics page."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.stats import count, count_file, whole, write_statistics
from data_prep.stats_page import statistics_page
from data_prep.token_file import HEADER, MAGIC, TOKENIZER_FOLDER, VERSION, TokenFile
from data_prep.tokenizer import Tokenizer
from tests.browser import CONTRAST, DARK, NARROW, SIDEWAYS, evaluated
from tests.data_prep.commands import assert_one_error, tokenize, tokenize_here
from tests.data_prep.folders import make_folder


def test_counts_match_the_tokens(tmp_path: Path) -> None:
    """Counts [1, 2, 259] and [3, 259], in training and again in validation."""
    make_folder(tmp_path)
    by_split = count(tmp_path)
    total = whole(by_split)
    assert (total.documents, total.tokens, total.text_bytes, total.shortest, total.longest) == (4, 10, 6, 2, 3)
    assert total.documents_in[1] == 4 and total.tokens_in.sum() == 10
    assert {id: int(total.uses_V[id]) for id in np.flatnonzero(total.uses_V)} == {1: 2, 2: 2, 3: 2, 259: 4}
    assert by_split["val"].tokens == 5


def test_page_has_all_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_folder(tmp_path)
    text = write_statistics(tmp_path)
    for line in [
        "documents             2    2    4",
        "bytes per token 0.600  0.600  0.600",
        "2 to 3                     4  100.00%         100.00%",
        "rows used: 4; of all tokens 50.0% in 2, 90.0% in 4, 99.0% in 4, 99.9% in 4",
        "rows used less than 100 times: 4; never: 256",
        "              259     4  40.00%  '<|endoftext|>'",
        "             0  '\\x00'",
        "and 236 more",
    ]:
        assert " ".join(line.split()) in " ".join(text.split())
    assert text.startswith((tmp_path / "statistics.txt").read_text())
    assert (tmp_path / "statistics.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "statistics.html").read_text().startswith("<!doctype html>")
    assert write_statistics(tmp_path) == text  # its own files do not disturb it


def test_page_draws_the_counts(browser: str, tmp_path: Path) -> None:
    """A narrow dark screen: bars and curves are drawn, nothing scrolls sideways, text is legible."""
    make_folder(tmp_path)
    by_split, tokenizer = count(tmp_path), Tokenizer.load(tmp_path / TOKENIZER_FOLDER)
    code = f"""const contrast = {CONTRAST};
    return {{ bars: document.querySelectorAll(".chart rect").length, beyond: {SIDEWAYS},
             lines: [...document.querySelectorAll(".chart path")].map((one) => one.dataset.name),
             contrast: contrast("p, dt, dd, th, td, h1, h2, h3, button, .legend span, caption"),
             text: document.body.innerText }};"""
    page = statistics_page(tmp_path, by_split, tokenizer)
    found = evaluated(browser, page, code, tmp_path, NARROW, DARK)
    assert found["bars"] == 2 and found["lines"] == ["Use of the rows: train", "Use of the rows: val"]
    assert found["beyond"] == 0 and found["contrast"] >= 4.5
    assert "'<|endoftext|>'" in found["text"] and "0.600" in found["text"]


@pytest.mark.parametrize("id", [-1, 70_000, 2**31 - 1])
def test_id_outside_the_vocabulary_is_refused(tmp_path: Path, id: int) -> None:
    np.array([1, id], np.int32).tofile(tmp_path / "a.bin")
    header = HEADER.pack(MAGIC, VERSION, 4, 1, 2)
    (tmp_path / "a.idx").write_bytes(header + struct.pack("<iqqq", 2, 0, 0, 1))
    with pytest.raises(DataError, match=rf"a\.bin: id {id} must be in \[0, 70000\)"):
        count_file(TokenFile(tmp_path / "a"), 70_000)


def test_command_prints_and_writes_statistics(tmp_path: Path) -> None:
    make_folder(tmp_path / "made")
    done = tokenize(f"stats={tmp_path / 'made'}")
    assert done.returncode == 0 and "rows used: 4" in done.stdout and not done.stderr
    assert_one_error(tokenize_here(f"stats={tmp_path / 'none'}"), "none does not exist")
    assert_one_error(tokenize_here(f"stats={tmp_path / 'made'}", "out=x"), "stats=FOLDER")

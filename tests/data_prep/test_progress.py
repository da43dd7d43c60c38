"""Progress of a command: bar, lines in a log, and those of a real run."""

import re
from pathlib import Path

import pytest

from data_prep import app, progress, terminal
from data_prep.app import TokenizeConfig
from data_prep.corpus import FilesCorpus
from data_prep.progress import Progress, clock
from data_prep.tokenizer import FileTokenizer


class Clock:
    """Stands in for `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


def test_log_has_one_line_per_minute(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1_000_000_000) as shown:
        shown.there(200_000_000)
        shown.add(300_000_000, 290_000_000, 70_000_000)
        for seconds in (1, 59, 60, 119):
            time.now = 100.0 + seconds
            shown.show(100_000_000, 20_000_000)
    assert capsys.readouterr().err == (
        "tokenise: 50%, 390 MB of text, 90.0M tokens, 6.5 MB/s, 1.50M tokens/s, 0:01:00 left\n"
    )


def test_time_left_needs_a_total(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None) as shown:
        time.now += 60
        shown.show(20_000_000, 5_000_000)
    with Progress(100) as shown:
        time.now += 60
        shown.show(0, 0)
    assert capsys.readouterr().err.splitlines() == [
        "tokenise: 20 MB of text, 5.0M tokens, 0.3 MB/s, 0.08M tokens/s",
        "tokenise: 0%, 0 MB of text, 0.0M tokens, 0.0 MB/s, 0.00M tokens/s",
    ]
    assert clock(3 * 3600 + 62.4) == "3:01:02"


def test_items_are_passed_on_and_counted(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    passed = []
    for item in progress.progress("abcd", "convert"):
        passed.append(item)
        time.now += 40
    assert passed == list("abcd")
    assert capsys.readouterr().err == "convert: 50%, 2 of 4, 0:01:20 left\n"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (79, "train  50% | 5/10, 0:00:09 left, 1,234 tokens/s"),
        (50, "train  50% | 5/10, 0:00:09 left"),
        (33, "train  50% | 5/10"),
        (16, "train  50%  5/10"),
        (8, "train  5"),
    ],
)
def test_narrow_window_keeps_the_first_facts(monkeypatch: pytest.MonkeyPatch, columns: int, line: str) -> None:
    monkeypatch.setattr(terminal, "plain_ascii", lambda: True)
    drawn = progress.bar("train", 5, 10, ["5/10", "0:00:09 left", "1,234 tokens/s"], columns)
    assert len(drawn) <= columns and re.sub(r"#+\d? *", "| ", drawn) == line


def test_run_shows_progress(
    tmp_path: Path,
    text_folder: Path,
    spec_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    corpus, tokenizer = FilesCorpus([str(text_folder)]), FileTokenizer(str(spec_folder))
    app.tokenize(TokenizeConfig(corpus, tokenizer, out="x", unit_mib=0.05, workers=1), tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    rate = r"\d+\.\d MB/s, \d+\.\d\dM tokens/s"
    line = rf"tokenise: \d+%, \d+ MB of text, \d+\.\dM tokens, {rate}(, \d+:\d\d:\d\d left)?"
    assert lines and all(re.fullmatch(line, each) for each in lines), lines
    shares = [int(re.findall(r"(\d+)%", each)[0]) for each in lines]
    assert shares == sorted(shares) and shares[-1] == 100 and lines[-1].endswith(" 0:00:00 left")

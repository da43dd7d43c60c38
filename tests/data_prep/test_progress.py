"""How far a run is, and how fast: on a terminal, in a log, and of a run itself."""

import re
import sys
from pathlib import Path

import pytest

from data_prep import app, progress
from data_prep.app import TokenizeConfig
from data_prep.corpus import FilesCorpus
from data_prep.progress import Progress, clock
from data_prep.tokenizer import FileTokenizer


class Clock:
    """In place of `time`."""

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


def test_terminal_line_is_updated_and_cleared(
    time: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(1000_000) as shown:
        for half_seconds in (1, 2):
            time.now = 100.0 + half_seconds / 2
            shown.show(half_seconds * 250_000, half_seconds * 50_000)
    first, second, end = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert first == "tokenise: 25%, 0 MB of text, 0.1M tokens, 0.5 MB/s, 0.10M tokens/s, 0:00:02 left"
    assert second == "tokenise: 50%, 0 MB of text, 0.1M tokens, 0.5 MB/s, 0.10M tokens/s, 0:00:01 left"
    assert end == ""


def test_time_left_needs_a_total(time: Clock) -> None:
    assert Progress(None).line(10, 20_000_000, 5_000_000) == (
        "tokenise: 20 MB of text, 5.0M tokens, 2.0 MB/s, 0.50M tokens/s"
    )
    assert Progress(100).line(10, 0, 0) == "tokenise: 0%, 0 MB of text, 0.0M tokens, 0.0 MB/s, 0.00M tokens/s"
    assert clock(3 * 3600 + 62.4) == "3:01:02"


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

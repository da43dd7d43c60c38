"""Tests parts of a run, concurrent and killed: the bytes match a plain run. Real processes, real files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.encode import UnitStride
from data_prep.errors import DataError
from data_prep.output import Output
from data_prep.token_file import Manifest
from data_prep.verify import verify
from tests.data_prep.commands import (
    SCRIPT,
    TIMEOUT,
    assert_one_error,
    folder_bytes,
    small_spec,
    texts,
    tokenize,
    tokenize_here,
    write_jsonl,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 documents, about 2 MB."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts(1000))


@pytest.fixture(scope="module")
def command(corpus: Path, spec_folder: Path) -> list[str]:
    """The arguments that tokenise `corpus` in about 20 units, without `out=`."""
    return [
        "corpus=files",
        f"corpus.paths=['{corpus}']",
        "tokenizer=file",
        f"tokenizer.path={spec_folder}",
        "unit_mib=0.1",
        "workers=1",
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, command: list[str]) -> Path:
    """The output of one plain run."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert tokenize(*command, f"out={out}").returncode == 0
    return out


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def units_done(out: Path, part: UnitStride) -> set[int]:
    done = {int(path.stem) for path in out.glob("unfinished/0*.json")}
    return {unit for unit in done if part.has(unit)}


def written(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}


def test_concurrent_parts_match_a_plain_run_after_a_kill(tmp_path: Path, command: list[str], plain: Path) -> None:
    out, parts = tmp_path / "out", [UnitStride(k, 3) for k in range(3)]
    command = [*command, f"out={out}"]
    done = tokenize(*command, "part=prepare")
    assert done.returncode == 0 and done.stdout == f"prepared: {out}\n", done

    running = [start(*command, f"part={part.index}/3") for part in parts]
    deadline = time.monotonic() + TIMEOUT
    while not units_done(out, parts[1]):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(running[1].pid, signal.SIGKILL)
    for process, code in zip(running, (0, -signal.SIGKILL, 0), strict=True):
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code and errors == ""
    units = len(Manifest.load(plain).split("train"))
    for part in (parts[0], parts[2]):
        assert units_done(out, part) == {unit for unit in range(units) if part.has(unit)}
    kept = units_done(out, parts[1])
    assert kept and len(kept) < sum(map(parts[1].has, range(units)))
    assert not (out / "manifest.json").exists()

    half_written = out / "train-00001.bin.tmp-elsewhere-1"
    half_written.write_bytes(b"of a part that may be at work")
    before = written(out)
    done = tokenize(*command, "part=1/3")
    expected = sum(map(parts[1].has, range(units))) - len(kept)
    assert done.returncode == 0 and f"{expected} units done, {len(kept)} done before" in done.stdout, done
    assert {path: written(out)[path] for path in before} == before and half_written.exists()

    before = written(out)
    done = tokenize(*command)
    assert done.returncode == 0 and done.stdout.startswith(f"done: {out}: 1,000 documents"), done
    assert "MB/s" not in done.stdout and written(out) == before  # nothing was encoded again
    assert folder_bytes(out) == folder_bytes(plain) and verify(out) == []
    assert tokenize_here(*command, "part=0/3").stdout.startswith("already done")


def test_tokenizer_is_trained_once_for_all_parts(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    command = [
        "corpus=files",
        f"corpus.paths=['{corpus}']",
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
        "unit_mib=0.3",
    ]
    assert_one_error(
        tokenize_here(*command, f"out={out}", "part=0/2"), "is not prepared for parts: run part=prepare first"
    )
    assert not out.exists()
    assert "trained a BPE" in tokenize(*command, f"out={out}", "part=prepare").stdout
    assert tokenize(*command, f"out={out}", "part=1/2").returncode == 0
    assert units_done(out, UnitStride()) == units_done(out, UnitStride(1, 2)) != set()
    before = written(out)
    done = tokenize(*command, f"out={out}", "workers=2")
    assert done.returncode == 0 and "trained a" not in done.stdout and "MB/s" in done.stdout
    assert {path: written(out)[path] for path in before} == before
    assert tokenize(*command, f"out={tmp_path / 'plain'}").returncode == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "plain")


def test_whole_run_and_parts_exclude_each_other(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", {"corpus": {}, "config": {}}, tokenizer_from_corpus=False)
    with pytest.raises(DataError, match="is not prepared for parts"), output.joined():
        pass
    with output.started():
        small_spec().save(output.folder / "tokenizer")
        (output.folder / "train-00000.bin").touch()  # a folder without token files would be left as it was found
        for hold in (output.started, output.joined):
            with pytest.raises(DataError, match=f"another run is writing to {output.folder}"), hold():
                pass
    with output.joined(), output.joined(), pytest.raises(DataError, match="another run is writing"), output.started():
        pass
    with output.started():
        pass


@pytest.mark.parametrize("part", ["3/3", "0/0", "-1/2", "1", "a/b", "1/2/3", "Prepare", ""])
def test_wrong_part_raises(part: str) -> None:
    with pytest.raises(DataError, match=r"part=.* must be K/N"):
        UnitStride.parse(part)


def test_wrong_part_is_one_line(tmp_path: Path, command: list[str]) -> None:
    assert_one_error(tokenize_here(*command, f"out={tmp_path / 'out'}", "part=2/2"), "part=2/2 must be K/N, 0 <= K < N")

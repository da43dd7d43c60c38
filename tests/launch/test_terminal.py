"""A training and its terminal, with real ranks: the window that is closed, the reader that goes away, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint import checkpoints, step_of
from tests.pretrain.tiny import write_tokens

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.layers=1 model.width=32 model.heads=2 model.context=32 train.global_batch=4 train.micro_batch=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens", vocab_size=97)


def launch(data: Path, run: Path, settings: str, **streams: object) -> subprocess.Popen:
    arguments = f"data.path={data} vocab.size=97 run.dir={run} log.every=1 train.precision=fp32 {SMALL} {settings}"
    return subprocess.Popen(
        [sys.executable, "launch/local.py", *arguments.split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        **streams,
    )


def until(process: subprocess.Popen, text: bytes) -> None:
    """Reads what it prints up to a line with that text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


def restarts(run: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    return [(line["class"], line["decision"]) for line in lines]


def test_a_training_outlives_the_reader_of_its_output_and_ctrl_c_saves_it(data, tmp_path):
    """As `2>&1 | tee log`, where Ctrl-C ends tee first."""
    process = launch(data, tmp_path / "run", "nproc=2 train.steps=100000", stderr=subprocess.STDOUT)
    until(process, b"step      2/")
    process.stdout.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    while metrics.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert restarts(tmp_path / "run") == [("STOPPED", "stop")]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, step_of(checkpoints(tmp_path / "run")[-1]) + 1))

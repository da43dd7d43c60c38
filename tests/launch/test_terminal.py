"""A training on a terminal, with real ranks: bar, closed window, lost reader, Ctrl-Z and Ctrl-C."""

import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint import checkpoints, step_of
from pretrain.compose import write_config
from pretrain.exits import Exit
from tests.pretrain.tiny import tiny_config, write_tokens
from tests.screen import lines_on_screen, on_a_terminal
from tests.warm import Command

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.layers=1 model.width=32 model.heads=2 model.context=32 train.global_batch=4 train.micro_batch=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens", vocab_size=97)


@pytest.fixture
def launch(data, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the launcher, run.dir=tmp_path/run. The end of the test ends it and its ranks."""
    started: list[subprocess.Popen] = []

    def start(settings: str, **streams: object) -> subprocess.Popen:
        own = f"data.path={data} vocab.size=97 run.dir={tmp_path}/run log.every=1 train.precision=fp32 {SMALL}"
        kind = subprocess.Popen if "preexec_fn" in streams else Command
        process = kind(
            [sys.executable, "launch/local.py", *own.split(), *settings.split()],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            **streams,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(process: subprocess.Popen, text: bytes) -> None:
    """Reads the output up to a line with that text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


def restarts(run: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    return [(line["class"], line["decision"]) for line in lines]


@contextmanager
def terminal_window() -> Iterator[tuple[int, dict[str, object]]]:
    """Yields a terminal's window, and arguments that give a process this terminal as its own."""
    window, terminal = pty.openpty()

    def take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    yield window, {"stdin": terminal, "stderr": terminal, "start_new_session": True, "preexec_fn": take}
    os.close(terminal)


def stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    late = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < late
        time.sleep(0.05)


def test_closing_the_terminals_window_saves_the_training(launch, tmp_path):
    """The launcher gets SIGHUP, and nothing can be written any more."""
    with terminal_window() as (window, streams):
        process = launch("nproc=2 train.steps=100000", **streams)
        until(process, b"step      2/")
        process.stdout.close()
        os.close(window)
        assert process.wait(timeout=60) == 0
    assert restarts(tmp_path / "run") == [("STOPPED", "stop")]
    assert step_of(checkpoints(tmp_path / "run")[-1]) >= 2


def test_ctrl_z_stops_the_ranks_and_fg_goes_on(launch, tmp_path):
    """The pause is longer than train.hang_timeout."""
    process = launch("nproc=2 train.steps=100000 train.hang_timeout=8")
    until(process, b"step      2/")
    process.stdout.close()
    process.send_signal(signal.SIGTSTP)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    wait_until(lambda: len(family) == 3 and all(map(stopped, family)), process)
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_bytes()
    time.sleep(9)
    assert metrics.read_bytes() == before, "no rank trains"
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: metrics.read_bytes().count(b"\n") > before.count(b"\n") + 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert restarts(tmp_path / "run") == [("STOPPED", "stop")]


@pytest.mark.parametrize("columns", [100, 40])
def test_a_terminal_shows_a_bar_that_mixes_with_nothing(data, tmp_path, columns):
    """Runs the command as users type it, with checkpoints on the way."""
    steps = "train.steps=40 checkpoint.every=16 optim.warmup_steps=30"
    own = f"data.path={data} vocab.size=97 run.dir={tmp_path}/run log.every=10 train.precision=fp32 {SMALL} {steps}"
    code, written = on_a_terminal([sys.executable, "launch/local.py", "nproc=2", *own.split()], columns)
    lines = lines_on_screen(written)
    assert code == 0, written
    assert [line.partition("  loss ")[0] for line in lines if "  loss " in line] == [
        "step  1/40", "step 10/40", "step 20/40", "step 30/40", "step 40/40"
    ]  # fmt: skip
    saved = [line.partition(" in ")[0] for line in lines if line.startswith("saved:")]
    assert saved == [f"saved: {tmp_path}/run/checkpoints/step-000000{step}" for step in (16, 32, 40)]
    assert sum(line.startswith("first step: done ") for line in lines) == 1
    assert "steps        40 of 40" in lines and lines[-2].startswith("sample: ")
    drawn = [re.sub(r"\x1b\[\d+m", "", bar) for bar in re.findall(r"\x1b\[K(train .*?)\r", written)]
    assert len(drawn) >= 5 and all(len(bar) < columns for bar in drawn), "at the start, and with each line"
    assert drawn[0].endswith(" 0/40, first step") and " 40/40" in drawn[-1]
    assert not any(line.startswith("train") or "█" in line for line in lines), "no bar is left"


def test_waiting_rank_ends_on_request(tmp_path):
    """The test itself is the store, and never answers."""
    config = tiny_config(write_tokens(tmp_path / "tokens"), tmp_path / "run")
    write_config(config, None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.train", str(config.path)],
            cwd=ROOT,
            env=os.environ | place | rank | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        server.settimeout(60)
        with server.accept()[0]:
            process.send_signal(signal.SIGTERM)
            try:
                _, errors = process.communicate(timeout=30)
            finally:
                process.kill()
    assert process.returncode == Exit.UNSTARTED
    assert errors == "rank 1 was asked to stop before the ranks had met: nothing to save\n"


def test_a_training_outlives_the_reader_of_its_output_and_ctrl_c_saves_it(launch, tmp_path):
    """Reproduces `2>&1 | tee log`: Ctrl-C ends tee first."""
    process = launch("nproc=2 train.steps=100000", stderr=subprocess.STDOUT)
    until(process, b"step      2/")
    process.stdout.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.read_bytes().count(b"\n") >= 5, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert restarts(tmp_path / "run") == [("STOPPED", "stop")]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, step_of(checkpoints(tmp_path / "run")[-1]) + 1))

"""A newcomer's look at a run: a real TensorBoard in a real browser."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from pretrain.config.monitor import LogConfig
from pretrain.monitor import MetricsLog
from tests.browser import dumped

STEPS, EVERY = 30, 10


def train(run):
    """What a run of 30 steps logs that is evaluated every 10."""
    run.mkdir()
    log = MetricsLog(run, LogConfig(), 0, STEPS)
    for step in range(1, STEPS + 1):
        scalars = {"step": step, "loss": 6 * math.exp(-step / 20), "grad_norm": 1.0, "lr": 1e-3, "tokens": 512 * step}
        if step % EVERY == 0:
            scalars |= {"val_loss": 6 * math.exp(-step / 20), "val_bits_per_byte": 2 * math.exp(-step / 20)}
        log.write(scalars)
    log.close()


@pytest.fixture
def tensorboard(tmp_path):
    """The address of a TensorBoard that has read the run in tmp_path/runs."""
    (tmp_path / "runs").mkdir()
    train(tmp_path / "runs" / "a")
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        tmp_path / "runs",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    with open(tmp_path / "tensorboard.log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield wait_until_read(process, tmp_path / "tensorboard.log")
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # with its data server
        process.wait(timeout=20)


def wait_until_read(process, log) -> str:
    """The address, once TensorBoard serves the last point; it reads the files in its own time."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    last = "data/plugin/scalars/scalars?run=a%2Ftensorboard&tag=val%2Fbits_per_byte"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        address = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
        try:
            if address and len(json.load(direct.open(address[0] + last, timeout=10))) == STEPS // EVERY:
                return address[0]
        except OSError:
            pass  # not there yet
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard did not read the run: {log.read_text()}")


def curves(page: str) -> dict[str, list[list[tuple[float, float]]]]:
    """The lines drawn on each card of the page, by the card's title: points (x, y) in pixels from the top left."""
    _, *parts = re.split(r'<tb-truncated-path[^>]* title="([^"]+)"', page)
    return {
        title: [
            [tuple(map(float, point.split(","))) for point in line[1:].split("L")]
            for line in re.findall(r' d="(M[^"\sZz]+L[^"\sZz]+)"', card)
        ]
        for title, card in zip(parts[::2], parts[1::2], strict=True)
    }


def test_the_curves_are_drawn(browser, tensorboard, tmp_path):
    done = dumped(browser, tensorboard, tmp_path)
    drawn = curves(done.stdout)
    expected = {"train/loss": STEPS, "train/lr": STEPS, "val/loss": STEPS // EVERY, "val/bits_per_byte": STEPS // EVERY}
    for title, points in expected.items():
        lines = [line for line in drawn.get(title, []) if len(line) == points]
        assert lines, f"no curve of {points} points on the card {title}; cards: {list(drawn)}; {done.stderr[-2000:]}"
        if title.endswith(("loss", "bits_per_byte")):
            heights = [y for _, y in lines[-1]]
            assert heights == sorted(heights), f"{title} falls, and so must its curve"

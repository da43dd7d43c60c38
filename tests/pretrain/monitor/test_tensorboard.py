"""First sight of two runs, in a real TensorBoard and a real browser."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from PIL import Image

from pretrain.config.monitor import LogConfig
from pretrain.hooks.lens import HeatMaps
from pretrain.monitor import BINS, MetricsLog
from pretrain.monitor.scalars import BIN, CORPUS, DETAILS, LAYER, PART, SCALARS, TASK, tag_of
from pretrain.timeline import PARTS as PARTS_OF_STEP
from tests.browser import DARK, dumped, screenshot

STEPS, EVERY = 30, 10
LAYERS = ("input", "block_0", "block_1", "output")
PARTS = {"": [""], CORPUS: ["/web", "/code"], BIN: [f"/{name}" for name in BINS], LAYER: [f"/{row}" for row in LAYERS]}
PARTS |= {BIN + LAYER: [f"/{name}/{row}" for name in BINS for row in LAYERS], "/topNpct": ["/top1pct", "/top50pct"]}
PARTS |= {TASK: ["/arc_easy/acc", "/arc_easy/acc_norm"], PART: [f"/{part}" for part in PARTS_OF_STEP]}
FIRST = ["loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm"]
RARE = {"val_loss", "val_bits_per_byte"}


def value(lr: float, step: int) -> float:
    return (6 + 1000 * lr) * math.exp(-step / 20)


def train(run: Path, lr: float) -> None:
    """Logs every scalar that there is, with all monitors on, every 10 steps."""
    run.mkdir(parents=True)
    log = MetricsLog(run, LogConfig(), 0, STEPS)
    log.describe({"optim.lr": lr, "model.layers": 3, "train.steps": STEPS, "vocab.tie": "tied", "run.dir": "a"}, None)
    maps = HeatMaps(log)
    for step in range(1, STEPS + 1):
        rare = step % EVERY == 0
        keys = [s.key + part for s in SCALARS for form in s.forms for part in PARTS[form]] if rare else FIRST
        scalars = {key: value(lr, step) for key in keys if rare or key not in RARE}
        if rare and run.name == "a":  # an image has a card per run
            maps.add(step, scalars)
        log.write({"step": step, **scalars}, {"embedding_damaged": [], "embedding_small": [1]} if rare else {})
    log.close()


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
    """The address of a TensorBoard that has read the runs `a` and `sweep/0`."""
    folder = tmp_path_factory.mktemp("board")
    train(folder / "runs" / "sweep" / "0", 2e-3)
    train(folder / "runs" / "a", 1e-3)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder / "runs", "--host", "127.0.0.1"]
    with open(folder / "tensorboard.log", "w+") as log:
        process = subprocess.Popen([*command, "--port", "0"], stdout=log, stderr=log, start_new_session=True)
    try:
        yield wait_until_read(process, folder / "tensorboard.log")
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # with its data server
        process.wait(timeout=20)


def fetched(address: str, path: str, body: dict | None = None, **query: str) -> Any:
    """The answer that TensorBoard gives to its own page."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}data/{path}?{urlencode(query, quote_via=quote)}", data)
    request.add_header("Content-Type", "application/json")
    return json.load(direct.open(request, timeout=10))


def wait_until_read(process: subprocess.Popen, log: Path) -> str:
    """The address, once TensorBoard serves the last point of each run; it reads the files in its own time."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        address = re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())
        try:
            if address and all(
                len(fetched(address[0], "plugin/scalars/scalars", run=run, tag=tag_of("loss"))) == STEPS
                for run in ("a", "sweep/0")
            ):
                return address[0]
        except OSError:
            pass  # not there yet
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard did not read the runs: {log.read_text()}")


@pytest.fixture(scope="module")
def page(browser, tensorboard, tmp_path_factory) -> str:
    """The elements of the page that opens first."""
    done = dumped(browser, tensorboard, tmp_path_factory.mktemp("page"))
    assert "metrics-main-view" in done.stdout, done.stderr[-2000:]
    return done.stdout


def cards(page: str) -> dict[str, list[list[tuple[float, float]]]]:
    """The cards in their order, by title: lines of points (x, y) in pixels from the top left."""
    _, *parts = re.split(r'<tb-truncated-path[^>]* title="([^"]+)"', page)
    return {
        title: [
            [tuple(map(float, point.split(","))) for point in line[1:].split("L")]
            for line in re.findall(r' d="(M[^"\sZz]+L[^"\sZz]+)"', card)
        ]
        for title, card in zip(parts[::2], parts[1::2], strict=True)
    }


def groups(page: str) -> dict[str, int]:
    """The groups in their order, and how many cards each has."""
    found = re.findall(r'class="group-title" title="([^"]+)".*?(\d+) cards?<', page)
    return {title: int(count) for title, count in found}


def test_the_first_card_is_the_loss_and_the_order_tells_the_story(page):
    shown = list(cards(page))
    first = [tag_of(key) for key in FIRST]
    assert shown[: len(first)] == first, shown
    speed = [tag_of(key) for key in ("mfu", "peak_memory_gib", "step_s", "tokens_per_s", "tokens_per_s_per_rank")]
    assert shown[len(first) : len(first) + len(speed)] == speed, shown
    assert list(groups(page)) == ["1 training", "2 data", "3 matrix", "4 lens", DETAILS]


def test_all_monitors_make_at_most_thirty_cards(page):
    """Quantities with many parts are in the last group, which is closed."""
    numbers = groups(page)
    assert numbers.pop(DETAILS) > 30 >= sum(numbers.values())
    opened = {title.split("/")[0] for title in cards(page)}
    assert opened == {"1 training", "2 data"}


def test_the_curves_are_drawn(page):
    drawn = cards(page)
    for key in FIRST:
        points = STEPS // EVERY if key in RARE else STEPS
        lines = [line for line in drawn[tag_of(key)] if len(line) == points]
        assert len(lines) >= 2, f"two runs have {points} points each on {key}"
        heights = [y for _, y in lines[-1]]
        assert heights == sorted(heights), f"{key} falls, and so must its curve"


def test_runs_are_named_by_their_folders(tensorboard, page):
    assert sorted(fetched(tensorboard, "runs")) == ["a", "sweep/0"]
    for name in ("a", "sweep/0"):
        assert re.search(rf">\s*{name}\s*<", page), name


def test_the_hparams_tab_compares_the_runs(tensorboard):
    """TensorBoard shows the first five hyperparameters, and the metrics, of each run."""
    experiment = fetched(tensorboard, "plugin/hparams/experiment", {"experimentName": ""})
    names = [info["name"] for info in experiment["hparamInfos"]]
    assert names == ["model.layers", "optim.lr", "train.steps", "vocab.tie"]
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_SUCCESS"],
        "colParams": [{"metric": {"tag": tag, "group": ""}} for tag in metrics],
        "startIndex": 0,
        "sliceSize": 100,
    }
    rows = fetched(tensorboard, "plugin/hparams/session_groups", body)["sessionGroups"]
    assert {row["name"]: row["hparams"]["optim.lr"] for row in rows} == {"a": 1e-3, "sweep/0": 2e-3}
    for row in rows:
        values = {metric["name"]["tag"]: metric["value"] for metric in row["metricValues"]}
        assert set(values) == set(metrics)
        assert values[tag_of("val_loss")] == pytest.approx(value(row["hparams"]["optim.lr"], STEPS))


def test_no_chart_of_the_custom_tab_is_empty(tensorboard):
    """Parts of one quantity are lines of one chart."""
    layout = fetched(tensorboard, "plugin/custom_scalars/layout")["category"]
    assert layout[0]["title"] == "Overview" and [category.get("closed", False) for category in layout[1:]] == [True] * 7
    titles = [chart["title"] for category in layout for chart in category["chart"]]
    assert len(titles) == len(set(titles)), "charts of two runs are merged"
    for category in layout:
        for chart in category["chart"]:
            pattern = "|".join(f"({tag})" for tag in chart["multiline"]["tag"])
            found = fetched(tensorboard, "plugin/custom_scalars/scalars", run="a", tag=pattern)["tag_to_events"]
            lines = 2 if category["title"] != "Overview" else 1
            assert len(found) >= lines and all(found.values()), chart["title"]


COLOURS = {"light": [(66, 80, 102), (18, 181, 203)], "dark": [(142, 152, 163), (18, 181, 203)]}  # of two runs


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_screenshot_has_curves_of_both_runs(browser, tensorboard, tmp_path, theme):
    flags = [DARK] if theme == "dark" else []
    with Image.open(screenshot(browser, tensorboard, tmp_path, *flags)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[-200:, 400:800].mean() > 128) == (theme == "light")
    first_cards = pixels[250:650, 300:1100]
    for colour in COLOURS[theme]:
        near = np.abs(first_cards - colour).max(-1) < 12
        assert near.any(1).sum() > 80, f"no curve of colour {colour}"

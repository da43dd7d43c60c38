"""A real browser without a window: what a page looks like once its scripts have run."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-3d-apis",  # TensorBoard then draws its lines as SVG, which is part of the page's text
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,3000",
    "--virtual-time-budget=20000",  # of the page's own clock, which stands still while it fetches
]


@pytest.fixture(scope="session")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no chromium: apt-get install chromium")
    return found


def dumped(browser: str, address: str, folder: Path) -> subprocess.CompletedProcess:
    """The page's elements, on stdout. `folder`: for the browser's own files."""
    return _run(browser, "--dump-dom", address, folder)


def evaluated(browser: str, page: str, code: str, folder: Path, *flags: str) -> Any:
    """Runs the body of a function in the page; returns its result. `flags`: a window size, a dark system."""
    run = f"document.body.dataset.result = JSON.stringify((() => {{ {code} }})())"
    path = folder / "evaluated.html"
    path.write_text(page.replace("</body>", f"<script>{run}</script></body>"))
    done = _run(browser, "--dump-dom", path.as_uri(), folder, *flags)
    result = re.search('data-result="([^"]*)"', done.stdout)
    assert result, done.stderr[-2000:] + done.stdout[-2000:]
    return json.loads(unescape(result[1]))


NARROW = "--window-size=400,900"
DARK = "--blink-settings=preferredColorScheme=0"
SIDEWAYS = "Math.max(0, document.documentElement.scrollWidth - innerWidth)"  # pixels beyond the right edge
# A function of a selector: the least contrast (WCAG 2) of a visible text in the page with what it is printed on.
CONTRAST = """(selector) => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    const colour = rgb(getComputedStyle(element).backgroundColor);
    return colour.length === 4 && colour[3] === 0 ? behind(element.parentElement) : colour;
  };
  return Math.min(...[...document.querySelectorAll(selector)].filter((one) => one.textContent.trim()).map((one) => {
    const [low, high] = [light(rgb(getComputedStyle(one).color)), light(behind(one))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }));
}"""


def screenshot(browser: str, address: str, folder: Path, *flags: str) -> Path:
    """A PNG of what a visitor sees."""
    path = folder / "screenshot.png"
    done = _run(browser, f"--screenshot={path}", address, folder, *flags)
    assert path.exists(), done.stderr[-2000:]
    return path


def _run(browser: str, what: str, address: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [browser, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", what, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)

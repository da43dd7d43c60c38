"""A real browser without a window: what a page looks like once its scripts have run."""

import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-3d-apis",  # TensorBoard then draws its lines as SVG, which the page's text holds
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,3000",
    "--virtual-time-budget=20000",  # of the page's own clock, which stands still while it fetches
]


@pytest.fixture
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no chromium: apt-get install chromium")
    return found


def dumped(browser: str, address: str, folder: Path) -> subprocess.CompletedProcess:
    """The page's elements, on stdout. `folder`: for the browser's own files."""
    return _run(browser, "--dump-dom", address, folder)


def screenshot(browser: str, address: str, folder: Path) -> Path:
    """A PNG of what a visitor sees."""
    path = folder / "screenshot.png"
    done = _run(browser, f"--screenshot={path}", address, folder)
    assert path.exists(), done.stderr[-2000:]
    return path


def _run(browser: str, what: str, address: str, folder: Path) -> subprocess.CompletedProcess:
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", what, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)

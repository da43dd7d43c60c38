"""Tests the process from which workers are forked, in a process of its own: the tests' ranks have another server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = """
import os, sys
from pathlib import Path
threads = len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))
sys.exit(0 if "data_prep.pool" in sys.modules and threads == 1 else 3)
"""
STARTS = f"""
import os
from multiprocessing import get_context
from data_prep import fork_server
before = dict(os.environ)
fork_server.start()
assert dict(os.environ) == before
worker = get_context("forkserver").Process(target=exec, args=({IMPORTED!r},))
worker.start()
worker.join(60)
assert worker.exitcode == 0, worker.exitcode
"""


@pytest.mark.parametrize("path", [None, "/nowhere"])
def test_worker_begins_with_its_imports_done_by_one_thread(path: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    command = [sys.executable, "-c", STARTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

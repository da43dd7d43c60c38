"""Tests the process from which workers are forked."""

import os
from multiprocessing import get_context

import pytest

from data_prep import fork_server

IMPORTED = """
import os, sys
from pathlib import Path
threads = len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))
sys.exit(0 if "data_prep.pool" in sys.modules and threads == 1 else 3)
"""


@pytest.mark.parametrize("path", [None, "/nowhere"])
def test_worker_begins_with_its_imports_done_by_one_thread(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path)
    before = dict(os.environ)
    fork_server.start()
    assert dict(os.environ) == before
    worker = get_context("forkserver").Process(target=exec, args=(IMPORTED,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0

"""The process from which workers are forked: it has imported what they need, once for all of them.

Not part of pool.py: a command starts it before its own slow imports, so that both import at the same time.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, resource_tracker
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start() -> None:
    """Starts the process, unless it runs. It has one thread, because others would not survive a fork."""
    get_context("forkserver").set_forkserver_preload(["data_prep.pool"])
    resource_tracker.ensure_running()  # otherwise the fork server's start starts it, and unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # workers inherit it: only we get Ctrl-C
    try:
        with _environment():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment() -> Iterator[None]:
    """Sets the process's environment: the path to this package, as it does not get our sys.path; no threads of BLAS."""
    path = os.environ.get("PYTHONPATH")
    wanted = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_early() -> None:
    """Starts the process if the command line asks for token files: then there are workers, most likely."""
    if any(argument.startswith("out=") for argument in sys.argv):
        start()

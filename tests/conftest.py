"""Configures pytest: skips fail in CI, except for a missing GPU, and the tests of one file share a process."""

import os
import signal
from collections.abc import Generator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

SLURM = "tests/slurm/"
LONG = (  # start these first, in this order: if a long file starts last, one process is idle
    SLURM,  # it mostly waits, so the other process has a core for itself
    "tests/docs/test_commands.py",
    "tests/pretrain/engine/test_engines.py",
    "tests/test_reliability.py",
    "tests/test_wheel.py",
    "",  # all others
)

Report = pytest.TestReport | pytest.CollectReport


def not_skipped(report: Report) -> Report:
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if "GPU" not in reason:
            report.outcome, report.longrepr = "failed", f"in CI only tests that need a GPU may be skipped: {reason}"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Resets signals to their defaults, because the processes that a test starts inherit them. nohup, a shell's
    background jobs and some tests leave signals ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next(place for place, start in enumerate(LONG) if item.nodeid.startswith(start)))


class ByFile(LoadFileScheduling):
    """Runs the tests of a file in one process, so that they share fixtures; likewise the tests on a real Slurm."""

    def _split_scope(self, nodeid: str) -> str:
        return SLURM if nodeid.startswith(SLURM) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Report, Report]:
    return not_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Report, Report]:
    """Applies the rule for CI to a module that is skipped as a whole."""
    return not_skipped((yield))

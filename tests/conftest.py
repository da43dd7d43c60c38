"""CI installs all that a test needs but a GPU: there, a test that is skipped for anything else has failed."""

import os
import signal
from collections.abc import Generator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

SLURM = "tests/slurm/"
LONG = (SLURM, "tests/test_reliability.py")  # begin first: a long file that begins last leaves one process idle

Report = pytest.TestReport | pytest.CollectReport


def not_skipped(report: Report) -> Report:
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if "GPU" not in reason:
            report.outcome, report.longrepr = "failed", f"in CI nothing is skipped but what needs a GPU: {reason}"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Give signals their usual meaning: nohup, a shell's background jobs and a test of a rank's end leave some ignored,
    and the processes that a test starts inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


class ByFile(LoadFileScheduling):
    """A file's tests run in one process, with the fixtures that they share; so do those on the real Slurm."""

    def _split_scope(self, nodeid: str) -> str:
        return SLURM if nodeid.startswith(SLURM) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Report, Report]:
    return not_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Report, Report]:
    """Of a module that is skipped whole."""
    return not_skipped((yield))

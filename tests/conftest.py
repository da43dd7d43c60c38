"""CI installs all that a test needs but a GPU: there, a test that is skipped for anything else has failed."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

SLURM = Path(__file__).parent / "slurm"

Report = pytest.TestReport | pytest.CollectReport


def not_skipped(report: Report) -> Report:
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if "GPU" not in reason:
            report.outcome, report.longrepr = "failed", f"in CI nothing is skipped but what needs a GPU: {reason}"
    return report


def pytest_configure() -> None:
    """Give signals their usual meaning: nohup and a shell's background jobs ignore some, and processes inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before xdist appends the group to each test's name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, with the fixtures that they share, and the real Slurm's tests together.

    Slurm first: it is the longest of what cannot be split, and must not be what is left over.
    """
    items.sort(key=lambda item: SLURM not in item.path.parents)
    for item in items:
        name = "slurm" if SLURM in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Report, Report]:
    return not_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Report, Report]:
    """Of a module that is skipped whole."""
    return not_skipped((yield))

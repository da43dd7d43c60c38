"""CI installs all that a test needs but a GPU: there, a test that is skipped for anything else has failed."""

import os
from collections.abc import Generator

import pytest

Report = pytest.TestReport | pytest.CollectReport


def not_skipped(report: Report) -> Report:
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if "GPU" not in reason:
            report.outcome, report.longrepr = "failed", f"in CI nothing is skipped but what needs a GPU: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Report, Report]:
    return not_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Report, Report]:
    """Of a module that is skipped whole."""
    return not_skipped((yield))

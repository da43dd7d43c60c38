"""One cluster for all tests of the session; without Slurm they are skipped by name, except in CI."""

import os

import pytest

from tests.slurm.cluster import missing, running


@pytest.fixture(scope="session")
def installed():
    why = missing()
    if why is not None:
        lacking = pytest.fail if os.environ.get("CI") else pytest.skip  # CI installs it: there it may not be missing
        lacking(why)


@pytest.fixture(scope="session")
def slurm(installed):
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_without_accounting(installed):
    with running(accounting=False) as cluster:
        yield cluster

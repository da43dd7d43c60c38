"""One cluster for all tests of the session. Without Slurm they are skipped."""

import pytest

from tests.slurm.cluster import missing, running


@pytest.fixture(scope="session")
def installed():
    why = missing()
    if why is not None:
        pytest.skip(why)


@pytest.fixture(scope="session")
def slurm(installed):
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_without_accounting(installed):
    with running(accounting=False) as cluster:
        yield cluster

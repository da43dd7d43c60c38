import pytest

from tests.launch.fake_slurm import FakeSlurm


@pytest.fixture
def fake_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path_factory.mktemp("slurm"), monkeypatch)

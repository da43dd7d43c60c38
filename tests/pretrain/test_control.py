"""Priority of a rank's reasons to stop."""

import time
from types import SimpleNamespace

import pytest

from pretrain.config.training import TrainingConfig
from pretrain.control import RunControl
from pretrain.stops import StopReason, StopRequests


def saves(failed: bool = False) -> SimpleNamespace:
    return SimpleNamespace(failed=lambda: failed, longest=0.0)


def test_highest_reason_wins():
    requests = StopRequests()
    control = RunControl(TrainingConfig(time_limit="1s"), requests)
    assert control.reason() is StopReason.NONE
    control.watch_saves(saves(), 60.0, {})
    assert control.reason() is StopReason.TIME_LIMIT
    requests.count = 1
    assert control.reason() is StopReason.REQUESTED
    control.watch_saves(saves(failed=True), 60.0, {})
    assert control.reason() is StopReason.UNSAVED


@pytest.mark.parametrize("left,reason", [(30.0, StopReason.REQUESTED), (90.0, StopReason.NONE)])
def test_job_deadline_requests_stop(monkeypatch, left, reason):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    control = RunControl(TrainingConfig(), StopRequests())
    control.watch_saves(saves(), 60.0, {"ROWSHARD_DEADLINE": str(now + left)})
    assert control.reason() is reason


def test_invalid_deadline_raises():
    with pytest.raises(ValueError, match=r"^ROWSHARD_DEADLINE=soon in the environment must be a unix time$"):
        RunControl(TrainingConfig(), StopRequests()).watch_saves(saves(), 60.0, {"ROWSHARD_DEADLINE": "soon"})

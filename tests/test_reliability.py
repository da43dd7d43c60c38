"""Tests the loop of kill -9 with few kills; `python tests/reliability.py --kills 30` runs the full one."""

from tests import reliability
from tests.warm import Command


class WarmLoop(reliability.Loop):
    popen, starting = Command, (0.1, 2)


def test_killed_runs_match_the_uninterrupted_run(capsys):
    reliability.main(["--kills", "4", "--steps", "30", "--seed", "1"], WarmLoop)
    said = capsys.readouterr().out
    assert "4 kills" in said and "all equal to the uninterrupted run" in said

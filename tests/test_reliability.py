"""The kill -9 loop in small; `python tests/reliability.py --kills 30` is the large one."""

from tests import reliability
from tests.warm import Command


class WarmLoop(reliability.Loop):
    popen, starting = Command, (0.1, 2)


def test_killed_runs_are_the_uninterrupted_one(capsys):
    reliability.main(["--kills", "4", "--steps", "30", "--seed", "1"], WarmLoop)
    said = capsys.readouterr().out
    assert "4 kills" in said and "all equal to the uninterrupted run" in said

"""The kill -9 loop in small; `python tests/reliability.py --kills 30` is the large one."""

from tests.pretrain.tiny import write_tokens
from tests.reliability import SETTINGS, Loop
from tests.warm import Command


class WarmLoop(Loop):
    popen, starting = Command, (0.1, 2)


def test_killed_runs_are_the_uninterrupted_one(tmp_path):
    settings = f"data.path={write_tokens(tmp_path / 'tokens')} {SETTINGS} train.steps=30"
    loop = WarmLoop(tmp_path, settings.split(), kills=4, steps=30, seed=1)
    loop.run()
    assert loop.tally.total() == 4 and "4 kills" in loop.table()

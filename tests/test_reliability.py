"""The kill -9 loop in small; `python tests/reliability.py --kills 30` is the large one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_killed_runs_are_the_uninterrupted_one():
    command = [sys.executable, "tests/reliability.py", "--kills", "3", "--steps", "30", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3 kills" in done.stdout and "all equal to the uninterrupted run" in done.stdout

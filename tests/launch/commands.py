"""The commands that users type, as they type them, and what a run has written."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch import local
from tests.in_process import in_process

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.layers=2 model.width=32 model.heads=2 model.context=32 train.global_batch=8 train.micro_batch=2"


def command(*arguments: str) -> list[str]:
    return [sys.executable, *(part for argument in arguments for part in argument.split())]


def run(
    *arguments: str, timeout: float = 120, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def refused(arguments: str) -> str:
    """Returns the one line of an error that the launcher says to these settings. They must start nothing."""
    done = in_process(local.main, *arguments.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def start(arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(f"launch/local.py {arguments}"),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def scalars(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def restarts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]

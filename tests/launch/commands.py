"""Runs commands as users type them, and reads what a run has written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch import local
from tests.in_process import in_process
from tests.warm import Command

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.layers=2 model.width=32 model.heads=2 model.context=32 train.global_batch=8 train.micro_batch=2"


def command(*arguments: str) -> list[str]:
    return [sys.executable, *(part for argument in arguments for part in argument.split())]


def run(
    *arguments: str, timeout: float = 120, environment: dict[str, str] | None = None, cold: bool = False
) -> subprocess.CompletedProcess:
    """Returns the output of the command and its exit code. cold: starts a new interpreter, as for a user."""
    with start(" ".join(arguments), environment, cold) as process:
        try:
            said, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def refused(arguments: str) -> str:
    """Returns the one line with which the launcher refuses these settings. It must start nothing."""
    done = in_process(local.main, *arguments.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


def start(
    arguments: str, environment: dict[str, str] | None = None, cold: bool = False, **streams: Any
) -> subprocess.Popen:
    """Starts the process of a command, such as `launch/local.py nproc=2`."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | streams
    given = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return (subprocess.Popen if cold else Command)(command(arguments), cwd=ROOT, env=given, **streams)


def scalars(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def restarts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]

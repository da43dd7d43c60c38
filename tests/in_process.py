"""Calls a command's `main` in the test's own process, which is seconds faster than a process that imports torch first.

Use it for the errors and output of a command. Tests of its child processes, signals and exit need the real command.
"""

import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parents[1]


def in_process(main: Callable[[], object], *arguments: str, cwd: Path = ROOT) -> CompletedProcess[str]:
    """Returns the output and exit code of a process with this command line."""
    GlobalHydra.instance().clear()
    code: object = 0
    with (
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as error,
        chdir(cwd),
        patch.object(sys, "argv", ["command", *arguments]),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    assert isinstance(code, int), "sys.exit with a text: use one_line"
    return CompletedProcess(list(arguments), code, out.getvalue(), error.getvalue())

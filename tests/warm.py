"""Starts a command as a fork of the server of ranks.py, which has already imported the command's modules.

A training of three steps on two ranks takes 15.8 s of processor time if each process imports torch, else 1.5 s. The
fork runs the same code with its own process id, session, streams, environment and signals; it only skips the start of
the interpreter and the imports. `run(..., cold=True)` in launch/commands.py starts a command as users do.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import ExitStack, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from multiprocessing import current_process, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

from tests.ranks import context

RESET = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP, signal.SIGALRM, signal.SIGCHLD)


class Command(subprocess.Popen):
    """Runs `python ARGUMENTS` in `cwd` with `env`; stdout and stderr are as in Popen, stdin is empty."""

    def _execute_child(self, args: list[str], *given: Any) -> None:  # type: ignore[override]
        cwd, environment, pipes, output, error = given[4], given[5], given[9:15], given[12], given[14]
        given_or_own = (output if output >= 0 else 1, error if error >= 0 else 2)
        streams = [Connection(os.dup(stream)) for stream in given_or_own]
        arguments = (args[1:], str(cwd), dict(environment), *streams)
        self._process = context.Process(target=_command, args=arguments, daemon=True)  # ended with this process
        self._process.start()
        for stream in streams:
            stream.close()
        self.pid, self._child_created = self._process.pid, True
        self._close_pipe_fds(*pipes)

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *error)

    def _internal_poll(self, **unused: Any) -> int | None:  # type: ignore[override]
        self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:  # type: ignore[override]
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


class _Rank(subprocess.Popen):
    """Starts a rank for the supervisor, as a fork of this process, which has imported the rank's modules."""

    def _execute_child(self, args: list[str], *given: Any) -> None:  # type: ignore[override]
        prepare, environment, pipes, inherited, error = given[1], given[5], given[9:15], given[9], given[14]
        self.pid = os.fork()
        if self.pid == 0:
            with _ending():
                os.setsid()
                prepare()
                os.dup2(inherited, 0)
                os.dup2(error, 2)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]  # closed, too
                _run(args[1:], environment)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _command(arguments: list[str], cwd: str, environment: dict[str, str], *streams: Connection) -> None:
    from launch import supervisor

    current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may start processes

    supervisor.subprocess = SimpleNamespace(Popen=_Rank, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined]
    with _ending():
        empty = os.open(os.devnull, os.O_RDONLY)
        for number, stream in enumerate((empty, *(stream.fileno() for stream in streams))):
            os.dup2(stream, number)
        os.close(empty)
        for stream in streams:
            stream.close()
        os.chdir(cwd)
        _run(arguments, environment)


class _ending:
    """Ends the process with the exit code and output that Python would have at its end."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        code = 0
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        elif error is not None:
            traceback.print_exception(error)
            code = 1
        with suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    """Runs the command in this process, with fresh streams and signals."""
    import torch

    from data_prep import terminal

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    for number in RESET:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = TextIOWrapper(BufferedWriter(FileIO(number, "w", closefd=False)), "utf-8", line_buffering=number == 2)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    terminal._outputs.clear()
    if arguments[0] == "-m":
        terminal.begin()  # as the package does when it is imported
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(str(Path(arguments[0]).resolve()), run_name="__main__")


def torchrun(world: int, *arguments: object, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Returns the output of `torchrun --nproc-per-node WORLD ARGUMENTS`. If a rank fails, kills the others and returns
    its exit code.
    """
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": 1}
    words, late = [sys.executable, *map(str, arguments)], time.monotonic() + timeout
    with TemporaryFile("w+") as out, TemporaryFile("w+") as error, ExitStack() as stack:
        ranks = []
        for rank in range(world):
            given = shared | {"RANK": rank, "LOCAL_RANK": rank}
            environment = os.environ | {key: str(value) for key, value in given.items()}
            ranks.append(Command(words, cwd=cwd, env=environment, stdout=out, stderr=error))
            stack.callback(ranks[-1].kill)
        codes = [rank.poll() for rank in ranks]
        while None in codes and not any(codes) and time.monotonic() < late:
            time.sleep(0.05)
            codes = [rank.poll() for rank in ranks]
        out.seek(0)
        error.seek(0)
        code = next(filter(None, codes), None if None in codes else 0)
        assert code is not None, f"not finished after {timeout} s: {out.read()} {error.read()}"
        return subprocess.CompletedProcess(words, code, out.read(), error.read())

"""Starts `pretrain.publish`, which sends metrics.jsonl to W&B and MLflow, beside a training. Rank 0 only."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ..config.monitor import LogConfig
from ..targets import TARGETS, identity

ROOT = Path(__file__).resolve().parents[2]


class Followers:
    """One process per target. It reads the file, so a target that fails neither stops nor slows the training; the next
    start, or the command, sends what is missing.
    """

    def __init__(self, run: Path, config: LogConfig) -> None:
        self._all, self._wait = list[_Follower](), config.wait_seconds
        config = replace(config)
        config.resolve()
        for name, value in config.targets.items():
            with _no_more_than_a_warning(name):
                identity(run)
                self._all.append(_Follower(run, name, value, config.project))

    def look(self) -> None:
        """Prints what the processes have said since the last call."""
        for follower in self._all:
            with _no_more_than_a_warning(follower.name):
                follower.look()

    def close(self) -> None:
        """Ends the processes, after `log.wait_seconds` at the latest."""
        late = time.monotonic() + self._wait
        for follower in self._all:
            with _no_more_than_a_warning(follower.name):
                follower.end()
        for follower in self._all:
            with _no_more_than_a_warning(follower.name):
                follower.close(late - time.monotonic())


class _Follower:
    """A process that ends if this one does. It stays in its process group, which a supervisor ends as a whole."""

    def __init__(self, run: Path, name: str, value: str, project: str) -> None:
        self.name, self._said = name, f"log.{name}={value}: "
        self._command = ["-m", "pretrain.publish", f"run={run.absolute()}", f"{name}={value}", f"project={project}"]
        self._log = run / f"{name}.log"
        with open(self._log, "ab") as log:
            self._read = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, *self._command, "live=true"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=ROOT,  # so that Python finds this package, installed or not
            )

    def look(self) -> None:
        """Prints the new lines of the process; those of the packages stay in its log."""
        with open(self._log, "rb") as log:
            log.seek(self._read)
            data = log.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(self._said):
                print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Asks the process to send the rest and to end. By a byte: a fork of this process may keep the pipe open."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.close()

    def close(self, seconds: float) -> None:
        try:
            code = self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self.look()
        if code:
            rest = subprocess.list2cmdline(["python", *self._command])
            print(
                f"warning: {TARGETS[self.name]} may lack the last steps, see {self._log}; to send them: {rest}",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def _no_more_than_a_warning(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        print(f"warning: log.{name}: {error}; training goes on", file=sys.stderr, flush=True)

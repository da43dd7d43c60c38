"""Sends the scalars of a run to Weights & Biases or MLflow: `python -m pretrain.publish --help`.

A training starts this as a process of its own: a server that is slow or gone costs it nothing.
"""

import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_prep.arguments import key_values
from data_prep.command import arguments_or, one_line
from data_prep.durable import exclusive
from data_prep.errors import DataError, headline

from .changes import settings_of
from .config.monitor import LogConfig
from .targets import TARGETS, Scalars, Target, connect

HELP = """Sends the scalars of a run, RUN/metrics.jsonl, to Weights & Biases or MLflow, each step once.

  python -m pretrain.publish run=runs/a wandb=online               the steps so far, and ends
  python -m pretrain.publish run=runs/a wandb=online live=true     also those to come, until Ctrl-C
  python -m pretrain.publish run=runs/a mlflow=http://host:5000 project=rowshard

With log.wandb or log.mlflow a training does this itself. Use the command for a run that was trained without, or on
nodes without a network. W&B and MLflow read their own variables, such as WANDB_API_KEY, too.
"""
KEYS = {
    "run": "folder of the run",
    "wandb": "online or offline, as log.wandb",
    "mlflow": "address of a server, or file:DIR, as log.mlflow",
    "project": "project of W&B, experiment of MLflow; default: rowshard",
    "live": "true: waits for further steps, until Ctrl-C or the end of its input; default: false",
}
LOOK_SECONDS = 1.0  # between looks at metrics.jsonl
RETRY_SECONDS = 30.0  # after a failure
READ_BYTES = 16 << 20  # of metrics.jsonl at once
END_BYTES = 256  # of what was read, that must still be there: a rollback cuts the file, and it grows again

Ended = Callable[[float], bool]  # waits up to this many seconds; True if no further step will come


def main() -> None:
    """Exits with 0 if all steps were sent, with 1 and a line if not, with 2 and a line if the command is wrong."""
    with one_line():
        given = key_values(arguments_or(HELP), KEYS, f"{'=, '.join(KEYS)}=")
        run, project = Path(given.get("run", "")), given.get("project") or LogConfig.project
        targets = [name for name in TARGETS if given.get(name)]
        if not (run / "metrics.jsonl").exists():
            raise ValueError(f"run={run} must be the folder of a run: it has no metrics.jsonl")
        if len(targets) != 1:
            raise ValueError(f"give one target, {' or '.join(f'{name}=' for name in TARGETS)}; see --help")
        (name,) = targets
        chosen: dict[str, Any] = {name: given[name]}
        LogConfig(**chosen).check_targets(os.environ)
        live = given.get("live", "false")
        if live not in ("true", "false"):
            raise ValueError(f"live={live} must be true or false")
        if live == "true" and not sys.stdin.isatty():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # the training decides when this ends
            os.nice(5)
        ended = input_ended if live == "true" else lambda seconds: True
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else new versions of MLflow refuse file:DIR
        with sending(run, name, ended):
            begin = lambda: connect(name, given[name], run, project, settings_of(run))  # noqa: E731
            done = publish(run, begin, ended, lambda line: print(f"log.{name}={given[name]}: {line}", flush=True))
    sys.exit(0 if done else 1)


def publish(run: Path, begin: Callable[[], Target], ended: Ended, say: Callable[[str], Any]) -> bool:
    """Sends all lines of RUN/metrics.jsonl until the end. Returns False if the target failed then.

    After a failure begins again: the target knows what it has.
    """
    target, failing, over = None, False, ended(0)
    while True:
        pause = LOOK_SECONDS
        try:
            if target is None:
                target, lines = begin(), Lines(run / "metrics.jsonl")
                say(target.where)
            while new := lines.new():
                target.send(new)
            failing = False
            if over:
                target.close()
                return True
        except Exception as error:  # of any package, network or server: none of them is the training's
            if not failing:
                say(f"warning: {type(error).__name__}: {headline(error)}")
            if over:
                return False
            target, failing, pause = None, True, RETRY_SECONDS
        over = ended(pause)


class Lines:
    """Lines that were added to metrics.jsonl. A file that was replaced or cut is read from its start again."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._read, self._end = path, -1, 0, b""  # `_end`: of what was read

    def new(self) -> list[Scalars]:
        """Scalars of the next lines; empty if there are none so far."""
        with open(self._path, "rb") as file:
            about = os.fstat(file.fileno())
            file.seek(self._read - len(self._end))
            if about.st_ino != self._file or file.read(len(self._end)) != self._end:
                self._file, self._read, self._end = about.st_ino, 0, b""
            file.seek(self._read)
            data = file.read(READ_BYTES)
        whole = data[: data.rfind(b"\n") + 1]
        self._read, self._end = self._read + len(whole), whole[-END_BYTES:] or self._end
        return list(_scalars(whole))


def _scalars(data: bytes) -> Iterator[Scalars]:
    for line in data.splitlines():
        try:
            found = {key: value for key, value in json.loads(line).items() if isinstance(value, int | float)}
        except (ValueError, AttributeError):
            continue  # cut short by a kill
        if "step" in found:
            yield found


def input_ended(seconds: float) -> bool:
    """Waits for the end of the standard input, or for anything in it, or Ctrl-C."""
    try:
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    except KeyboardInterrupt:
        return True


@contextmanager
def sending(run: Path, name: str, ended: Ended) -> Iterator[None]:
    """Waits for the process of an earlier start, which may still be sending. Raises DataError if that does not end."""
    with ExitStack() as lock:
        while True:
            over = ended(0)
            try:
                busy = f"run={run} is being sent to {TARGETS[name]} by another process: wait for it, or stop it"
                lock.enter_context(exclusive(run / f".{name}.lock", busy))
                break
            except DataError:
                if over:
                    raise
                ended(LOOK_SECONDS)
        yield


if __name__ == "__main__":
    main()

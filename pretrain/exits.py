"""Exit codes of a rank, `pretrain.train`, and how its launcher reads them and signals.

Imports nothing heavy: a launcher needs no torch while it waits for ranks.
"""

import atexit
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

RESTARTS_FILE = "restarts.jsonl"  # in the run's folder: lines of starts that ended, and of spikes


def restarts_in(run: Path) -> list[dict[str, Any]]:
    """Reads the file, oldest start first, without lines cut short by a kill. Raises OSError if it cannot be read."""
    try:
        text = (run / RESTARTS_FILE).read_text(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


def tell_restarts(run: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Appends objects to the file, one line each; a line that a kill has cut short stays alone. Raises OSError."""
    with open(run / RESTARTS_FILE, "ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read() not in (b"", b"\n")
        file.write(b"\n" * torn + b"".join(json.dumps(line).encode() + b"\n" for line in lines))


class Exit(IntEnum):
    """Ends of a rank. Codes from 0 up are exit codes; negative ones are signals."""

    FINISHED = 0  # saved at the run's last step, train.stop_after or train.time_limit
    CRASHED = 1  # any other exception
    REFUSED = 2  # a wrong setting, wrong data, or no checkpoint that may be resumed
    DIVERGED = 3  # norm or loss is not finite
    UNSAVED = 4  # a checkpoint could not be written
    LOST_PEER = 5  # a collective failed because another rank has ended
    DEVICE = 6  # an error of CUDA or NCCL
    OUT_OF_MEMORY = 7  # of the GPU or the host, by an error; if the kernel ends the rank, it is KILLED
    NOT_MET = 8  # the ranks did not find each other; another start may help
    CANNOT_MEET = 9  # an interface or a host does not exist; another start with the same settings cannot help
    STOPPED = 75  # saved because of a signal or ROWSHARD_DEADLINE; meant to be resumed (EX_TEMPFAIL)
    UNSTARTED = 77  # stopped by a signal before the ranks had met: nothing to save
    ENDED = 76  # set by the launcher, never by a rank: ended because another rank failed
    KILLED = -signal.SIGKILL  # or by any other signal
    HUNG = -signal.SIGALRM  # by its own watchdog

    @classmethod
    def of(cls, code: int) -> "Exit":
        """Maps a process's return code, as `subprocess` gives it, to its Exit."""
        if code in (*cls,) and code != cls.ENDED:
            return cls(code)
        return cls.KILLED if code < 0 else cls.CRASHED

    @property
    def good(self) -> bool:
        return self in (Exit.FINISHED, Exit.STOPPED)

    @property
    def asked(self) -> bool:
        """True if the rank ended on request."""
        return self in (Exit.STOPPED, Exit.UNSTARTED)


def leave(main: Callable[[], object]) -> NoReturn:
    """Calls `main` and ends this rank with its exit code, but without Python's own shutdown.

    gloo's threads outlive `destroy_process_group`. One that lets go of a tensor during that shutdown needs the
    interpreter's lock, and the process dies by SIGABRT though its work is done (pytorch/pytorch#179291). After an
    error that shutdown may also wait for a collective that never ends, and so may what libraries do at exit: then
    that is left out as well.
    """
    code = 0
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = int(Exit.CRASHED)
    if Exit.of(code).good:
        with suppress(Exception):
            atexit._run_exitfuncs()  # what libraries have registered; it prints their errors
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)

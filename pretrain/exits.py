"""How a rank ends: the exit codes of `pretrain.train`, and what its launcher makes of a signal.

Imports nothing heavy: a launcher waits for ranks without torch.
"""

import atexit
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

RESTARTS_FILE = "restarts.jsonl"  # in the run's folder: one line for every start that has ended, and what came of it


def restarts_in(run: Path) -> list[dict[str, Any]]:
    """Reads the file, oldest start first; a line that a kill has cut short is left out. Raises OSError if it cannot."""
    try:
        text = (run / RESTARTS_FILE).read_text(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


class Exit(IntEnum):
    """Codes of 0 and more are a rank's own; those below are signals that ended it."""

    FINISHED = 0  # at the run's end, train.stop_after or train.time_limit, saved
    CRASHED = 1  # any exception that has no code of its own
    REFUSED = 2  # a wrong setting, wrong data, or no checkpoint that may be resumed
    DIVERGED = 3  # a norm or a loss that is not finite
    UNSAVED = 4  # a checkpoint could not be written
    LOST_PEER = 5  # a collective failed because another rank is gone
    DEVICE = 6  # an error of CUDA or NCCL
    OUT_OF_MEMORY = 7  # of the GPU or the host, as this rank was told; the kernel says it by KILLED
    NOT_MET = 8  # the ranks did not find each other; they may at the next start
    CANNOT_MEET = 9  # nor will they with the same settings: an interface or a host that does not exist
    STOPPED = 75  # saved, as a signal or ROWSHARD_DEADLINE asked: to be gone on with (EX_TEMPFAIL)
    UNSTARTED = 77  # a signal asked it to stop before the ranks had met: there was nothing to save
    ENDED = 76  # given by the launcher, never by a rank: ended because another one had failed
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
        """True if it has ended because it was asked to."""
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

"""Maps old names of settings to current ones. Old names are still read, on a command line and in a run's files.

Not part of overrides.py, because the end of a job reads it without Hydra.
"""

import re
from collections.abc import Iterable

RENAMED = {
    "checkpoint.seconds_before_limit": "checkpoint.reserve_seconds",
    "clean.unlike": "clean.exclude",
    "monitor.embedding": "monitor.embedding_every",
    "monitor.lens": "monitor.lens_every",
    "restart.without_progress": "restart.max_failures",
    "train.hang_after": "train.hang_timeout",
}


FORMER = {new: old for old, new in RENAMED.items()}


def former(argument: str) -> str:
    """The setting with its old name, if it had one."""
    signs, key, rest = _parts(argument)
    return f"{signs}{FORMER.get(key, key)}{rest}"


def renamed(arguments: Iterable[str]) -> dict[str, str]:
    """Maps each argument with an old name to the same argument with the current name."""
    found = {}
    for argument in arguments:
        signs, key, rest = _parts(argument)
        if key in RENAMED:
            found[argument] = f"{signs}{RENAMED[key]}{rest}"
    return found


def _parts(argument: str) -> tuple[str, str, str]:
    """Splits an argument into Hydra's signs, the key, and the rest from the = on."""
    found = re.fullmatch(r"([+~]*)([^=]*)(.*)", argument, re.DOTALL)
    assert found is not None
    return found[1], found[2], found[3]

"""Old names of settings, which are still read: on a command line, and in a run's files.

Apart from overrides.py because a job that ends reads it without Hydra.
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


def renamed(arguments: Iterable[str]) -> dict[str, str]:
    """Finds the arguments that set a key by its old name, and what each is today."""
    found = {}
    for argument in arguments:
        signs, key, rest = re.fullmatch(r"([+~]*)([^=]*)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        if key in RENAMED:
            found[argument] = f"{signs}{RENAMED[key]}{rest}"
    return found

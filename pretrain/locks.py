"""Locks on a run's folder: its launcher's, and its ranks'. Apart from both because they and tools share it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.durable import exclusive

LAUNCH_LOCK = ".launch.lock"  # in the run's folder; held by the launcher
RANKS_LOCK = ".ranks.lock"  # likewise; held by rank 0, or by who else may write or remove checkpoints


@contextmanager
def lock_run(run: Path, lock: str) -> Iterator[None]:
    """Holds the run's folder for this process and its life. Raises ValueError if another one does."""
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / lock, f"run.dir={run} is in use by another process: stop it, or choose another run.dir"):
        yield


def check_free(run: Path, *locks: str) -> None:
    """Raises ValueError, early, if another process holds one of the run's locks. Makes no folder."""
    for lock in locks:
        if (run / lock).exists():
            with suppress(OSError), lock_run(run, lock):  # that it cannot be opened is said where it is locked
                pass

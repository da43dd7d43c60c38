"""Locks on a run's folder, of its launcher and of its ranks. Shared with the tools."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.durable import exclusive

LAUNCH_LOCK = ".launch.lock"  # in the run's folder; held by the launcher
RANKS_LOCK = ".ranks.lock"  # likewise; held by rank 0, or by a tool that writes or removes checkpoints


@contextmanager
def lock_run(run: Path, lock: str) -> Iterator[None]:
    """Locks the run's folder while the context lasts. Raises ValueError if another process holds the lock."""
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / lock, f"run.dir={run} is in use by another process: stop it, or choose another run.dir"):
        yield


def check_free(run: Path, *locks: str) -> None:
    """Raises ValueError early if another process holds one of the run's locks. Creates no folder."""
    for lock in locks:
        if (run / lock).exists():
            with suppress(OSError), lock_run(run, lock):  # if it cannot be opened, the lock itself reports that
                pass

"""One rank's reasons to stop, and its watchdog. Not part of stops.py, which launchers import as well."""

import time
from collections.abc import Mapping
from typing import Protocol

from .config.training import TrainingConfig
from .stops import Deadline, StopCheck, StopReason, StopRequests
from .watchdog import Watchdog


class Saves(Protocol):
    """Interface of `CheckpointManager` that `RunControl` needs."""

    @property
    def longest(self) -> float: ...
    def failed(self) -> bool: ...


class RunControl:
    """Collects this rank's reasons to stop. Its watchdog runs while the context lasts."""

    def __init__(self, config: TrainingConfig, requests: StopRequests) -> None:
        self.started, self.time_limit = time.time(), config.time_limit_seconds
        self.watchdog = Watchdog(config.hang_timeout)
        self.checks: list[StopCheck] = [(StopReason.REQUESTED, requests.asked)]

    def watch_saves(self, saves: Saves, reserve: float, environment: Mapping[str, str]) -> None:
        """Adds the reasons that depend on saves: a save has failed, or a deadline leaves time for just one more.

        Deadlines are the run's time limit and its job's, ROWSHARD_DEADLINE. At least `reserve` seconds remain before
        them. Raises ValueError if ROWSHARD_DEADLINE is not a unix time.
        """
        self.checks.append((StopReason.UNSAVED, saves.failed))
        limits = []
        if self.time_limit is not None:
            limits.append((StopReason.TIME_LIMIT, self.started + self.time_limit))
        given = environment.get("ROWSHARD_DEADLINE")
        if given:
            try:
                limits.append((StopReason.REQUESTED, float(given)))
            except ValueError:
                raise ValueError(f"ROWSHARD_DEADLINE={given} in the environment must be a unix time") from None
        self.checks += [(reason, Deadline(limit, reserve, lambda: saves.longest)) for reason, limit in limits]

    def reason(self) -> StopReason:
        """Returns the highest of this rank's reasons. Call it once per step: deadlines measure steps by the calls."""
        return max([reason for reason, stop in self.checks if stop()], default=StopReason.NONE)

    def alive(self) -> None:
        """Rearms the watchdog."""
        self.watchdog.alive()

    def __enter__(self) -> "RunControl":
        self.watchdog.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watchdog.__exit__(*error)

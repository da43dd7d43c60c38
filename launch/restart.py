"""Decides whether a run is restarted after its ranks have ended. Writes decision and reason to RUN/restarts.jsonl."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pretrain.changes import Change, settings_changed
from pretrain.exits import RESTARTS_FILE, Exit, restarts_in, tell_restarts

from .supervisor import NO_EXIT_STATUS, Record

NEEDED = {"job", "from", "step", "decision"}  # keys that this module reads from a line
HOPELESS = {
    Exit.REFUSED: "the same settings would be refused again",
    Exit.DIVERGED: "the same steps would diverge again",
    Exit.CANNOT_MEET: "the ranks cannot meet with the same settings",
}


@dataclass
class RestartConfig:
    """Restarts after a failure."""

    max_failures: int = 3  # give up after this many consecutive failed starts without a newer checkpoint; 0: no restart
    delay: float = 0.0  # seconds to wait before a restart

    def __post_init__(self) -> None:
        for key in ("max_failures", "delay"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"restart.{key}={getattr(self, key)} must not be negative")


class Decision(StrEnum):
    DONE = "done"
    RESTART = "restart"
    STOP = "stop"  # on request: on this machine, or with cluster.requeue=false
    GIVE_UP = "give up"
    LEFT = "left to Slurm"  # Slurm is ending the job: it was cancelled, or Slurm restarts it


def cause(records: Iterable[Record]) -> Record:
    """Returns the record that explains why all ranks ended: the first rank that failed by its own fault.

    If ranks of several nodes have no record and no other explains the end, the node is unknown: its host is "".
    """
    records = list(records)

    innocent = (Exit.FINISHED, Exit.STOPPED, Exit.ENDED, Exit.LOST_PEER, Exit.NOT_MET, Exit.UNSTARTED)

    def order(record: Record) -> tuple[int, bool, float]:
        guilt = innocent.index(record.ending) if record.ending in innocent else len(innocent)
        reported = (
            record.last != NO_EXIT_STATUS
        )  # Slurm may have killed a rank without a record, because of another rank
        return guilt + (reported and guilt == len(innocent)), not record.waits, -record.time

    first = max(records, key=order)
    unknown = (
        first.last == NO_EXIT_STATUS and len({record.host for record in records if record.last == NO_EXIT_STATUS}) > 1
    )
    return replace(first, host="") if unknown else first


def bad_node(first: Record, records: Iterable[Record]) -> str | None:
    """Returns the host that may be at fault. After a hang: only if the ranks of all other hosts wait for it."""
    hung_alone = first.ending is Exit.HUNG and all(record.waits for record in records if record.host != first.host)
    return (first.host or None) if hung_alone or first.ending in (Exit.DEVICE, Exit.KILLED) else None


def decide(ending: Exit, progress: bool, fruitless: int, config: RestartConfig) -> tuple[Decision, str]:
    """Decides what to do after a start that ended with `ending`, and why.

    progress: whether there is a newer checkpoint than at its beginning. fruitless: consecutive starts without one, this
    one included.
    """
    if ending is Exit.FINISHED:
        return Decision.DONE, "the run is complete"
    if ending.asked and (progress or fruitless < max(1, config.max_failures)):
        saved = "saved" if ending.good else "not started: there was nothing to save"
        return Decision.RESTART, f"stopped on request, and {saved}"
    if ending.asked:  # for example, the time limit is shorter than the start
        return Decision.GIVE_UP, f"{fruitless} consecutive starts without a step"
    if ending in HOPELESS:
        return Decision.GIVE_UP, HOPELESS[ending]
    if ending is Exit.OUT_OF_MEMORY and not progress:  # after progress it is rare, or other programs used the memory
        return Decision.GIVE_UP, "the same settings would run out of memory again"
    if config.max_failures == 0:
        return Decision.GIVE_UP, "restart.max_failures=0"
    if progress:
        return Decision.RESTART, "it wrote a newer checkpoint"
    if fruitless < config.max_failures:
        return Decision.RESTART, f"start {fruitless} of {config.max_failures} without a newer checkpoint"
    return Decision.GIVE_UP, f"{fruitless} consecutive starts without a newer checkpoint"


class History:
    """RUN/restarts.jsonl: one object per start that has ended. A line that cannot be written is kept in memory, and
    written together with the next one.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / RESTARTS_FILE
        self._unwritten: list[dict[str, Any]] = []

    def lines(self) -> list[dict[str, Any]]:
        """Returns the lines, oldest first, without lines cut short by a kill."""
        found = []
        try:
            found = restarts_in(self.path.parent)
        except OSError as error:
            self._warn(error)
        return [line for line in found if line.keys() >= NEEDED] + self._unwritten

    def fruitless(self) -> int:
        """Counts the consecutive starts without a newer checkpoint, up to now."""
        count = 0
        for line in reversed(self.lines()):
            if line["decision"] in (Decision.DONE, Decision.STOP, Decision.GIVE_UP) or line["step"] > line["from"]:
                break
            count += line["decision"] == Decision.RESTART
        return count

    def write(
        self,
        job: str,
        start_step: int,
        step: int,
        cause: Record,
        decision: Decision,
        why: str,
        changes: Sequence[Change] = (),
    ) -> bool:
        """Appends a line. Returns True if it is on the disk; otherwise other processes do not count this start.

        changes: settings changed since the checkpoint that this start resumed.
        """
        line = {
            "time": time.time(),
            "attempt": len(self.lines()) + 1,
            "job": job,
            "from": start_step,
            "step": step,
            "class": cause.ending.name,
            "rank": cause.rank,
            "host": cause.host,
            "how": cause.how,
            "last": cause.last,
            "decision": decision,
            "why": why,
        } | ({"changes": list(changes)} if changes else {})
        self._unwritten.append(line)
        try:
            tell_restarts(self.path.parent, self._unwritten)
        except OSError as error:
            self._warn(error)
            return False
        self._unwritten.clear()
        return True

    def _warn(self, error: OSError) -> None:
        print(f"warning: {self.path}: {error.strerror}", file=sys.stderr, flush=True)


def newest_checkpoint(run: Path) -> Path | None:
    """Returns the newest finished checkpoint. Does not read it: the ranks do."""
    found = [path.parent for path in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((path for path in found if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]), default=None)


def newest_step(run: Path) -> int:
    """Returns the step of the newest finished checkpoint; -1: there is none."""
    newest = newest_checkpoint(run)
    return -1 if newest is None else int(newest.name[5:])


def changes_at_start(run: Path) -> list[Change]:
    """Returns the settings changed since the checkpoint that a start now resumes."""
    return settings_changed(run, newest_checkpoint(run))

"""Decides whether a run whose ranks have ended is started again; writes RUN/restarts.jsonl, which tells why."""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pretrain.changes import Change, settings_changed
from pretrain.exits import RESTARTS_FILE, Exit, restarts_in

from .supervisor import NO_EXIT_STATUS, Record

NEEDED = {"job", "from", "step", "decision"}  # keys of a line that something here reads
HOPELESS = {
    Exit.REFUSED: "the same settings would be refused again",
    Exit.DIVERGED: "the same steps would diverge again",
    Exit.CANNOT_MEET: "the ranks cannot meet with the same settings",
}


@dataclass
class RestartConfig:
    """When a run whose ranks have failed is started again."""

    max_failures: int = 3  # failed starts in a row without a newer checkpoint, then give up; 0: never start again
    delay: float = 0.0  # seconds to wait before a start after a failure

    def __post_init__(self) -> None:
        for key in ("max_failures", "delay"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"restart.{key}={getattr(self, key)} must not be negative")


class Decision(StrEnum):
    DONE = "done"
    RESTART = "restart"
    STOP = "stop"  # as asked: on this machine, or with cluster.requeue=false
    GIVE_UP = "give up"
    LEFT = "left to Slurm"  # which is ending the job: it was cancelled, or Slurm starts it again by itself


def cause(records: Iterable[Record]) -> Record:
    """The record that explains how all have ended: of those that failed, the first to do so on its own.

    Where ranks of several nodes are silent and no other tells why, nobody knows which node it was: its host is "".
    """
    records = list(records)

    innocent = (Exit.FINISHED, Exit.STOPPED, Exit.ENDED, Exit.LOST_PEER, Exit.NOT_MET, Exit.UNSTARTED)

    def order(record: Record) -> tuple[int, bool, float]:
        guilt = innocent.index(record.ending) if record.ending in innocent else len(innocent)
        reported = record.last != NO_EXIT_STATUS  # who is silent may have been ended by Slurm, because of another one
        return guilt + (reported and guilt == len(innocent)), not record.waits, -record.time

    first = max(records, key=order)
    unknown = (
        first.last == NO_EXIT_STATUS and len({record.host for record in records if record.last == NO_EXIT_STATUS}) > 1
    )
    return replace(first, host="") if unknown else first


def bad_node(first: Record, records: Iterable[Record]) -> str | None:
    """The host that may be at fault for that cause. Of a hang only where the ranks of all others wait for it."""
    hung_alone = first.ending is Exit.HUNG and all(record.waits for record in records if record.host != first.host)
    return (first.host or None) if hung_alone or first.ending in (Exit.DEVICE, Exit.KILLED) else None


def decide(ending: Exit, progress: bool, fruitless: int, config: RestartConfig) -> tuple[Decision, str]:
    """Decides what to do after a start that ended with `ending`, and why.

    progress: whether there is a newer checkpoint than at its beginning; fruitless: starts without, in a row and up to
    this one.
    """
    if ending is Exit.FINISHED:
        return Decision.DONE, "where it was meant to get"
    if ending.asked and (progress or fruitless < max(1, config.max_failures)):
        saved = "saved" if ending.good else "not started: there was nothing to save"
        return Decision.RESTART, f"stopped on request, and {saved}"
    if ending.asked:  # such as a job whose time limit is shorter than its start
        return Decision.GIVE_UP, f"{fruitless} starts in a row without a step"
    if ending in HOPELESS:
        return Decision.GIVE_UP, HOPELESS[ending]
    if ending is Exit.OUT_OF_MEMORY and not progress:  # with progress it is rare, or others used the memory
        return Decision.GIVE_UP, "the same settings would run out of memory again"
    if config.max_failures == 0:
        return Decision.GIVE_UP, "restart.max_failures=0"
    if progress:
        return Decision.RESTART, "there is a newer checkpoint than at its start"
    if fruitless < config.max_failures:
        return Decision.RESTART, f"start {fruitless} of {config.max_failures} without a newer checkpoint"
    return Decision.GIVE_UP, f"{fruitless} starts in a row without a newer checkpoint"


class History:
    """RUN/restarts.jsonl: an object for every start that has ended. What cannot be written is kept in memory, and tried
    again with the next line.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / RESTARTS_FILE
        self._unwritten: list[dict[str, Any]] = []

    def lines(self) -> list[dict[str, Any]]:
        """Oldest first. A line that a kill cut short is none."""
        found = []
        try:
            found = restarts_in(self.path.parent)
        except OSError as error:
            self._warn(error)
        return [line for line in found if line.keys() >= NEEDED] + self._unwritten

    def fruitless(self) -> int:
        """Starts without a newer checkpoint, in a row and up to now."""
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
        """Returns True if it is on the disk: only then does another process count this start.

        changes: settings that have changed since the checkpoint that this start resumed.
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
            with open(self.path, "ab+") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                torn = file.read() not in (b"", b"\n")
                lines = b"".join(json.dumps(each).encode() + b"\n" for each in self._unwritten)
                file.write(b"\n" * torn + lines)
        except OSError as error:
            self._warn(error)
            return False
        self._unwritten.clear()
        return True

    def _warn(self, error: OSError) -> None:
        print(f"warning: {self.path}: {error.strerror}", file=sys.stderr, flush=True)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest finished one. Reads nothing in it: that is the ranks' part."""
    found = [path.parent for path in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((path for path in found if path.name[5:].isdecimal()), key=lambda path: int(path.name[5:]), default=None)


def newest_step(run: Path) -> int:
    """Step of the newest finished checkpoint, -1 if there is none."""
    newest = newest_checkpoint(run)
    return -1 if newest is None else int(newest.name[5:])


def changes_at_start(run: Path) -> list[Change]:
    """Settings that have changed since the checkpoint that a start now resumes."""
    return settings_changed(run, newest_checkpoint(run))

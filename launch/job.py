"""Runs inside a Slurm job: a supervisor per rank and, after the last rank has ended, the decision what happens next.

`srun` starts one `SlurmRank` per rank; submitit transports it. Supervisors report failures to each other through files
in RUN/attempts/<job>-<restart>/ on the shared file system. When all ranks have ended, for whatever reason, the batch
script calls `python -m launch.job close RUN …` on the first node. It decides whether Slurm requeues the job.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import submitit

from data_prep import terminal
from data_prep.durable import durable
from pretrain.changes import Change
from pretrain.exits import Exit
from pretrain.stops import StopRequests

from .restart import Decision, History, RestartConfig, bad_node, cause, changes_at_start, decide, newest_step
from .supervisor import NO_EXIT_STATUS, Record, Supervisor

SLURM_SECONDS = 60  # to wait for an answer from Slurm
RECORD_SECONDS = 20  # to wait for the ranks' records: to be written while Slurm ends the job, and to become visible
ENDING = ("COMPLETING", "CANCELLED", "PREEMPTED", "NODE_FAIL", "STOPPED", "TIMEOUT", "DEADLINE", "REVOKED")
USABLE = ("idle", "mix", "alloc", "comp", "resv", "plnd")  # node states; a state with a mark: the node does not answer
FIRST_PORT, PORTS = 10_000, 20_000  # below the ephemeral ports of the system


@dataclass
class SlurmRank:
    """One rank of a job, called in its own srun task. Never returns: exits with 0 if the rank has finished, or was
    stopped and saved. If a task exits with another code, srun ends all others.
    """

    config_path: str

    def __call__(self) -> None:
        terminal.begin()  # the disk of the job's log may be full
        run = Path(self.config_path).parent
        rank = int(os.environ["SLURM_PROCID"])
        attempt = Attempt.of_job(run)
        with StopRequests(after=signal.SIG_IGN) as requests:  # Slurm may send another signal
            if rank == 0:
                attempt.begin()
            attempt.join(rank)
            supervisor = Supervisor(
                [sys.executable, "-m", "pretrain.train", self.config_path],
                {rank: os.environ | rendezvous()},
                requests,
                record=attempt.record,
                elsewhere=attempt.failure,
            )
            (record,) = supervisor.run()
        sys.exit(0 if record.ending.good else record.code if record.code > 0 else 1)


class Attempt:
    """One start of the run's ranks. Its supervisors share what they know through files in the attempt's folder."""

    def __init__(self, run: Path, name: str) -> None:
        self.run, self.name, self.folder = run, name, run / "attempts" / name

    @classmethod
    def of_job(cls, run: Path) -> "Attempt":
        """Returns the attempt of this job. Each requeue is a new attempt."""
        return cls(run, f"{os.environ['SLURM_JOB_ID']}-{restarts_of_job()}")

    def begin(self) -> None:
        """Writes the state of the run at the start of the attempt. Called by the first rank. If the file cannot be
        written, the attempt counts as one without progress.
        """
        self._report_lost_attempts()
        facts = {
            "step": newest_step(self.run),
            "ranks": int(os.environ["SLURM_NTASKS"]),
            "changes": changes_at_start(self.run),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "attempt.json", facts)
        except OSError as error:
            print(f"warning: cannot write the start of attempt {self.name}: {error}", file=sys.stderr, flush=True)

    def join(self, rank: int) -> None:
        """Writes a "no exit status" record; it stands until the rank reports."""
        self._keep(Record.silent(rank, os.environ["SLURMD_NODENAME"]))

    def record(self, record: Record) -> None:
        self._keep(record)
        if not record.ending.good:
            with suppress(OSError):  # another rank was first; or the disk is full: then srun ends the others
                (self.folder / "failed").symlink_to(record.ending.name)

    def failure(self) -> Exit | None:
        """Returns the ending of the rank that failed first; None: no rank has failed."""
        try:
            return Exit[os.readlink(self.folder / "failed")]
        except OSError:
            return None

    def records(self) -> list[Record]:
        return [Record.of_dict(json.loads(path.read_text())) for path in sorted(self.folder.glob("rank-*.json"))]

    def begun(self) -> tuple[int, int]:
        """Returns the newest step at the start, and the number of ranks. Without a file: the newest step now, and 1."""
        try:
            facts = json.loads((self.folder / "attempt.json").read_text())
        except OSError:
            return newest_step(self.run), 1
        return facts["step"], facts["ranks"]

    def changes(self) -> list[Change]:
        """Returns the settings that had changed at the start of the attempt; empty if unknown."""
        try:
            return json.loads((self.folder / "attempt.json").read_text()).get("changes", [])
        except OSError:
            return []

    def _report_lost_attempts(self) -> None:
        """Writes a history line for each attempt without one: its batch script was lost together with the node."""
        history = History(self.run)
        reported = {line["job"] for line in history.lines()}
        for path in sorted((self.run / "attempts").glob("*/attempt.json"), key=lambda path: path.stat().st_mtime):
            attempt = Attempt(self.run, path.parent.name)
            if attempt.name not in reported and attempt.name != self.name and (records := attempt.records()):
                why = "its end was not seen: a node was lost, or Slurm preempted it"
                first = cause(records)
                if first.last == NO_EXIT_STATUS and records[0].last == NO_EXIT_STATUS:
                    first = records[0]  # rank 0 runs on the batch script's node, which left no report either
                history.write(attempt.name, attempt.begun()[0], newest_step(self.run), first, Decision.LEFT, why)

    def _keep(self, record: Record) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            node = {"host": os.environ["SLURMD_NODENAME"]}  # Slurm's name of the node may differ from the host name
            _write(self.folder / f"rank-{record.rank:05d}.json", record.as_dict() | node)
        except OSError as error:
            print(f"warning: cannot write how rank {record.rank} ended: {error}", file=sys.stderr, flush=True)


def rendezvous() -> dict[str, str]:
    """Builds the environment variables that `pretrain.train` reads from Slurm's variables."""
    job, restarts = int(os.environ["SLURM_JOB_ID"]), restarts_of_job()
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_of_this_node()),
        "MASTER_ADDR": submitit.JobEnvironment().hostnames[0],  # a container may have no scontrol to ask
        "MASTER_PORT": str(FIRST_PORT + (job * 31 + restarts) % PORTS),
    }
    end = job_end()
    return found | ({"ROWSHARD_DEADLINE": str(end)} if end is not None else {})


def restarts_of_job() -> int:
    """Returns how often Slurm has requeued the job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _tasks_of_this_node() -> int:
    """Parses this node's number of tasks from a list of all nodes, as in 4(x2),3."""
    given = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ["SLURM_TASKS_PER_NODE"]
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", given):
        counts += [int(tasks)] * int(times or 1)
    return counts[int(os.environ["SLURM_NODEID"])]


def job_end() -> float | None:
    """Returns the job's deadline in unix time; None: no limit. Asks squeue if Slurm is too old to set a variable."""
    given = os.environ.get("SLURM_JOB_END_TIME")
    if given:
        return float(given)
    with suppress(ValueError):
        return datetime.fromisoformat(_ask("squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%e")).timestamp()
    return None


def hosts(nodes: str) -> list[str]:
    """Expands a list of nodes, such as n[1-3], to names."""
    return _ask("scontrol", "show", "hostnames", nodes).split()


def close(run: Path, config: RestartConfig) -> bool:
    """Decides what follows the attempt of this job that has just ended, writes the decision down, and carries it out.

    Returns False if the run ends before its last step: the job counts as failed.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue ends the batch script
    attempt, history, job = Attempt.of_job(run), History(run), os.environ["SLURM_JOB_ID"]
    start_step, ranks = attempt.begun()
    state, _, reason = _ask("squeue", "-h", "-j", job, "-o", "%T %r").partition(" ")
    too_late = reason == "TimeLimit"  # the ranks had not saved by then
    ended_by_slurm = state in ENDING and not too_late
    records = _all_records(attempt, ranks)
    first = cause(records)
    step = newest_step(run)
    fruitless = history.fruitless() + (step <= start_step)
    decision, why = decide(first.ending, step > start_step, fruitless, config)
    if ended_by_slurm and decision is not Decision.DONE:
        decision, why = Decision.LEFT, f"Slurm ends the job, its state is {state}"
    elif decision is Decision.RESTART and "Requeue=0" in _ask("scontrol", "--oneliner", "show", "job", job):
        decision, why = Decision.STOP, f"{why}; cluster.requeue=false"
    bad, excluded = None if too_late else bad_node(first, records), None
    if decision is Decision.RESTART and bad is not None:
        excluded, remark = _without(bad)
        why += f"; {remark}"
    written = history.write(attempt.name, start_step, step, first, decision, why, attempt.changes())
    starts = restarts_of_job() + 1  # no fewer than the consecutive starts without progress
    if decision is Decision.RESTART and step <= start_step and not written and starts >= config.max_failures:
        decision, why = Decision.GIVE_UP, f"start {starts} of this job, and {history.path} cannot be written"
    print(f"{decision}: {why} (rank {first.rank} on {first.host or 'an unknown node'}: {first.how})", flush=True)
    if decision is Decision.RESTART:
        return _requeue(excluded, 0.0 if first.ending.asked else config.delay)
    return decision is not Decision.GIVE_UP


def _all_records(attempt: Attempt, ranks: int) -> list[Record]:
    """Reads the records of all ranks. Waits up to RECORD_SECONDS if none explains the end: files of other nodes may
    become visible later.
    """
    late = time.monotonic() + RECORD_SECONDS
    while True:
        records = attempt.records()
        missing = set(range(ranks)) - {record.rank for record in records}
        records += [Record.silent(rank, "") for rank in missing]
        if cause(records).last != NO_EXIT_STATUS or time.monotonic() >= late:
            return records
        time.sleep(0.5)


def _without(host: str) -> tuple[str | None, str]:
    """Returns the nodes to exclude, so that the next start does not use `host`, and a remark; None: too few would be
    left.
    """
    job = os.environ["SLURM_JOB_ID"]
    listed = _ask("squeue", "-h", "-j", job, "-o", "%x").strip()
    excluded = set(hosts(listed)) if listed and listed != "(null)" else set()
    excluded.add(host)
    listed = _ask("sinfo", "-h", "-N", "-p", os.environ["SLURM_JOB_PARTITION"], "-o", "%N|%t|%G|%f")
    nodes = {name: (state, kind) for name, state, *kind in (line.split("|") for line in listed.splitlines())}
    alike = nodes.get(host, ("", []))[1]  # GPUs and features: a replacement must have the same
    usable = {name for name, (state, kind) in nodes.items() if state in USABLE and kind == alike}
    needed = int(os.environ["SLURM_JOB_NUM_NODES"])
    if len(usable - excluded) < needed:
        return None, f"{host} is not excluded: without it there are too few nodes"
    return ",".join(sorted(excluded)), f"{host} is excluded"


def _requeue(excluded: str | None, delay: float) -> bool:
    """Requeues the job under the same number. Returns False if Slurm refuses; a busy one may need several tries.

    Excluded nodes and start time are set afterwards, because Slurm accepts them only for waiting jobs.
    """
    job = os.environ["SLURM_JOB_ID"]
    for pause in (1, 5, 15, 60, 0):
        if _run("scontrol", "requeue", job) is not None:
            break
        time.sleep(pause)
    else:
        print("error: Slurm did not requeue the job", file=sys.stderr, flush=True)
        return False
    changes = [f"ExcNodeList={excluded}"] if excluded else []
    changes += [f"StartTime=now+{math.ceil(delay)}"] if delay else []
    if changes:
        _run("scontrol", "update", f"JobId={job}", *changes)
    return True


def _ask(*command: str) -> str:
    """Returns the output of a Slurm command; "" if it fails."""
    return _run(*command) or ""


def _run(*command: str) -> str | None:
    """Returns the output of a Slurm command; None, with a warning, if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        print(f"warning: {' '.join(command)}: {done.stderr.strip()}", file=sys.stderr, flush=True)
        return None
    return done.stdout.strip()


def _write(path: Path, facts: dict[str, Any]) -> None:
    with durable(path) as file:
        file.write(json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] != "close":
        sys.exit("usage: python -m launch.job close RUN WITHOUT_PROGRESS DELAY")
    sys.exit(not close(Path(sys.argv[2]), RestartConfig(int(sys.argv[3]), float(sys.argv[4]))))

"""State of submitted jobs: a job's state in Slurm, the job that uses a folder, a log to follow.

Not part of submission.py, because it also handles jobs of earlier commands.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import submitit

from data_prep import terminal
from data_prep.terminal import EXIT_INTERRUPTED

JOB_FILE = "job.json"  # in the folder that a job writes: the job submitted last
ASK_EVERY, LOOK_EVERY = 5.0, 0.5  # seconds between looks at the state of a followed job, and at its log
FORGOTTEN = "forgotten"
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED"),
}
ANSWER_SECONDS = 120


def state(job: str) -> str | None:
    """Returns the job's state in squeue; None if Slurm no longer knows the job. Raises OSError if squeue fails."""
    done = _ask("squeue", "--noheader", "--states=all", "--array", f"--jobs={job}", "--format=%T")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(f"squeue failed for job {job}: {done.stderr.strip() or done.returncode}")
    return done.stdout.split()[0] if done.stdout.strip() else None


def alive(job: str) -> bool:
    """True if the job is pending or running."""
    now = state(job)
    return now is not None and now not in ENDED


def exit_code(job: str) -> int | None:
    """Returns an ended job's exit code, or 128 + its signal; None if unknown."""
    done = _ask("scontrol", "--oneliner", "show", "job", job)
    found = re.search(r"JobState=(\w+).* ExitCode=(\d+):(\d+)", done.stdout)
    if found is None and shutil.which("sacct"):
        done = _ask("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State,ExitCode")
        found = re.search(r"(\w+).*\|(\d+):(\d+)", done.stdout)
    if found is None:
        return None
    word, code, signal = found[1], int(found[2]), int(found[3])
    if word == "COMPLETED":
        return 0
    return code or (128 + signal if signal else 1)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} has not answered for {ANSWER_SECONDS} s") from None


def holder_of(folder: Path) -> str | None:
    """Returns the job in `folder`/job.json, if it has not ended."""
    try:
        job: str = json.loads((folder / JOB_FILE).read_text())["job"]
    except FileNotFoundError:
        return None
    return job if alive(job) else None


def follow(job: submitit.Job[object]) -> int:
    """Prints the log as it grows, across requeues, until the job has ended. Returns its exit code."""
    terminal.product()
    said, seen, ended, due = "", 0, 0, 0.0
    try:
        while ended < 2:  # a requeued job may look ended for a moment
            if time.monotonic() >= due:
                now = _state(job.job_id)
                ended = ended + 1 if now == FORGOTTEN or now in ENDED else 0
                if now != said:
                    print(f"job {job.job_id}: {now}", file=sys.stderr, flush=True)
                said, due = now, time.monotonic() + ASK_EVERY
            seen = show(job.paths.stdout, seen)
            time.sleep(LOOK_EVERY)
    except KeyboardInterrupt:
        print(f"the job keeps running; cancel: scancel {job.job_id}", file=sys.stderr)
        return EXIT_INTERRUPTED
    show(job.paths.stdout, seen)
    code = exit_code(job.job_id)
    if code is None:
        raise ValueError(f"Slurm no longer knows job {job.job_id}; its log: {job.paths.stdout}")
    return code


def _state(job: str) -> str:
    try:
        return state(job) or FORGOTTEN
    except OSError as error:  # the controller may be restarting
        return str(error)


def show(log: Path, seen: int) -> int:
    """Prints the log from byte `seen` on. Returns the new position."""
    try:
        with open(log, "rb") as stream:
            stream.seek(seen)
            new = stream.read()
    except FileNotFoundError:
        return seen
    sys.stdout.buffer.write(new)
    sys.stdout.buffer.flush()
    return seen + len(new)

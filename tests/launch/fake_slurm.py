"""Fakes Slurm's commands for a launcher: small scripts that print what a test has prepared."""

from pathlib import Path

import pytest

ANSWERS = {
    "srun": "exit 1",
    "sbatch": """
        if [ -e refusal ]; then cat refusal >&2; exit 1; fi
        cp "$1" script; echo submitted >> submissions; echo Submitted batch job 12""",
    "squeue": """
        echo "$@" >> asked
        if [ ! -e states ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
        head -n 1 states; [ "$(wc -l < states)" = 1 ] || sed -i 1d states""",
    "scontrol": """
        if [ ! -e job ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
        cat job""",
}
SACCT = "cat accounts 2>/dev/null"


class FakeSlurm:
    """Answers as a test prepares them. refuse: sbatch's error, with which it refuses. states: squeue's answers in turn;
    the last one repeats; none: the job is unknown. ended: scontrol's answer about the job.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name, answer in ANSWERS.items():
            self.command(name, answer)
        monkeypatch.setenv("PATH", str(folder))

    def command(self, name: str, answer: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\ncd {self.folder}\n{answer.strip()}\n")
        path.chmod(0o755)

    def refuse(self, words: str) -> None:
        (self.folder / "refusal").write_text(words)

    def states(self, *states: str) -> None:
        (self.folder / "states").write_text("".join(f"{state}\n" for state in states))

    def forget(self) -> None:
        (self.folder / "states").unlink(missing_ok=True)

    def ended(self, state: str, code: str) -> None:
        """Sets scontrol's answer in Slurm's form."""
        said = f"JobId=12 JobName=a JobState={state} Reason=None Requeue=1 Restarts=1 ExitCode={code} RunTime=00:01:00"
        (self.folder / "job").write_text(f"{said}\n")

    @property
    def script(self) -> str:
        return (self.folder / "script").read_text()

    @property
    def submissions(self) -> int:
        path = self.folder / "submissions"
        return len(path.read_text().splitlines()) if path.exists() else 0

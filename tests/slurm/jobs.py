"""A run as a job of the cluster: submitted by the user's command, watched, and restarted without Slurm's delay."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from launch.job_state import ENDED
from pretrain.exits import RESTARTS_FILE
from tests.pretrain.tiny import VOCAB
from tests.reliability import steps_logged
from tests.slurm.cluster import Slurm, environment_of
from tests.warm import Command

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
STEPS = 80
PATIENCE = 240.0  # seconds, for a start of the ranks and a hundred steps on a busy machine
TRAINING = (
    f"vocab.size={VOCAB} vocab.multiple=8 vocab.parallel={RANKS} model.layers=2 model.width=24 model.heads=3"
    " model.context=16 train.micro_batch=3 train.global_batch=24 train.precision=fp32 optim.lr=1e-2"
    f" optim.warmup_steps=5 seed=7 train.steps={STEPS} checkpoint.every=8 checkpoint.keep=2"
    " checkpoint.reserve_seconds=1 log.every=1 log.tensorboard=false"
)
CLUSTER = f"+cluster=cpu cluster.nodes={RANKS} cluster.cpus_per_task=1 cluster.time=0:10:00"


def command(typed: str, environment: dict[str, str] | None = None) -> str:
    """Runs one of our commands. Returns its output; it must succeed."""
    with Command(
        [sys.executable, *typed.split()],
        cwd=ROOT,
        env=environment or os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said


class Job:
    """A training in `run`, by default on two nodes."""

    def __init__(self, slurm: Slurm, data: Path, run: Path, settings: str = "", flags: str = "") -> None:
        self.slurm, self.run = slurm, run
        typed = f"launch/slurm.py {flags} {CLUSTER} data.path={data} run.dir={run} {TRAINING} {settings}"
        self.said = command(typed, slurm.environment)
        found = re.search(r"\bjob:? (\d+)", self.said)
        assert found, self.said
        self.id = found[1]

    @property
    def state(self) -> str:
        return self._squeue("%T")

    @property
    def restarts(self) -> list[dict]:
        """The run's records of its starts."""
        return [json.loads(line) for line in (self.run / RESTARTS_FILE).read_text().splitlines()]

    def ranks(self) -> list[psutil.Process]:
        """Returns the rank processes, sorted by rank; at least one is alive."""
        found = {}
        for process in self.slurm.processes():
            variables = environment_of(process)
            with suppress(psutil.Error):
                if variables.get("SLURM_JOB_ID") == self.id and "pretrain.train" in process.cmdline():
                    found[int(variables["RANK"])] = process
        return [found[rank] for rank in sorted(found)]

    def train_on(self, steps: int = 15) -> None:
        """Waits until the run has logged that many further steps."""
        goal = steps_logged(self.run) + steps
        self.slurm.wait_until(lambda: steps_logged(self.run) >= goal or self.state in ENDED, PATIENCE)
        assert steps_logged(self.run) >= goal, f"job {self.id} is {self.state}"

    def wait_for_requeue(self) -> None:
        """Waits until the job is requeued; Slurm then holds it for two minutes."""
        self.slurm.wait_until(lambda: self._squeue("%T %r") == "PENDING BeginTime" or self.state in ENDED, PATIENCE)
        assert self.state == "PENDING", f"job {self.id} is {self.state}"

    def go_on(self) -> None:
        """Starts the job soon, but not in the second of the requeue: slurmd would take it for the ended job."""
        self.slurm.call("scontrol", "update", f"JobId={self.id}", "StartTime=now+2")

    def end(self) -> str:
        """Waits for the end. Returns the last state."""
        self.slurm.wait_until(lambda: self.state in ENDED, PATIENCE)
        return self.state

    def cancel(self) -> None:
        self.slurm.call("scancel", "--quiet", self.id)
        self.end()

    def logs(self) -> str:
        files = [*sorted(self.run.glob("slurm/*.out")), self.run / RESTARTS_FILE]
        logs = [f"== {file.name}\n{file.read_text()[-6000:]}" for file in files if file.exists()]
        return "\n".join([self.said, self.slurm.call("scontrol", "show", "job", self.id), *logs])

    def _squeue(self, form: str) -> str:
        return self.slurm.call("squeue", "-h", "--states=all", "-j", self.id, "-o", form).strip()


@contextmanager
def frozen(processes: list[psutil.Process]) -> Iterator[None]:
    """Freezes the processes, like a machine that is far too slow."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def signal_waits(process: psutil.Process) -> bool:
    """True if a frozen process has a pending signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return any(int(pending, 16) for pending in re.findall(r"^S[hi][dg]Pnd:\s+(\w+)", status, re.MULTILINE))

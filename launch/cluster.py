"""Cluster settings of a job, as in conf/cluster/NAME.yaml, and the job that they make."""

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from data_prep.mistakes import CONF
from launch.hardware import HARDWARE, Hardware
from launch.submission import Job

TIME_FORM = "a time such as 2:30:00, or with days 1-12:00:00 (in a file in quotes: YAML makes a number of 2:30:00)"
CLUSTERS = CONF / "cluster"
OWNED_KEYS = {  # sbatch's keys that we or submitit write, and the setting to use instead
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes and cluster.tasks_per_node",
    "ntasks-per-node": "cluster.tasks_per_node",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.memory",
    "time": "cluster.time",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "exclude": "cluster.exclude",
    "signal": "cluster.warn_seconds",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "export": "cluster.environment",
    "job-name": "run.dir",
    "output": "run.dir",
    "error": "run.dir",
    "open-mode": "nothing: the log of a job that is requeued goes on",
    "array": "--multirun, or cluster.tasks where a corpus is tokenised",
}


@dataclass
class ClusterConfig:
    """Resources that a job asks of Slurm. partition, account, qos, constraint and exclude are sbatch's."""

    nodes: int = 1
    gpus_per_node: int = 0
    gpu: str | None = None  # what GPU a node has, a name in launch/hardware.py; null: none
    tasks_per_node: int | None = None  # ranks of a node; null: one per GPU, or one
    cpus_per_task: int = 1
    tasks: int = 1  # jobs side by side, for tokenising only
    memory: str = "0"  # of a node, such as 400G; 0: all
    time: str = ""  # Slurm's limit, such as 1-12:00:00
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    container: str | None = None  # an image for Slurm's --container-image (pyxis)
    mounts: list[str] = field(default_factory=list)  # what the container sees besides the run and the data, as FROM:TO
    python: str | None = None  # the command that is Python in a task; null: this one, or python3 in a container
    setup: list[str] = field(default_factory=list)  # lines of the job's script
    environment: dict[str, str] = field(default_factory=dict)  # variables of every rank
    warn_seconds: int = 120  # the job is told to save so long before its time limit
    requeue: bool = True  # the job may go on by itself
    sbatch: dict[str, Any] = field(default_factory=dict)  # further keys of sbatch

    def __post_init__(self) -> None:
        leasts = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "tasks": 1}
        for key, least in leasts.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"cluster.{key}={value} must be at least {least}")
        gpus = [name for name, hardware in HARDWARE.items() if hardware.device == "cuda"]
        if self.gpus_per_node and self.gpu not in gpus:
            raise ValueError(f"cluster.gpu={self.gpu} must be one of {', '.join(gpus)}: cluster.gpus_per_node is not 0")
        if not self.gpus_per_node and self.gpu is not None:
            raise ValueError(f"cluster.gpu={self.gpu} must be null: cluster.gpus_per_node=0")
        if self.gpus_per_node and self.ranks_of_a_node > self.gpus_per_node:
            raise ValueError(
                f"cluster.tasks_per_node={self.tasks_per_node} must not exceed"
                f" cluster.gpus_per_node={self.gpus_per_node}"
            )
        if not re.fullmatch(r"\d+[KMGT]?", self.memory):
            raise ValueError(f"cluster.memory={self.memory} must be a size such as 400G (0: all of a node's)")
        if not self.time:
            raise ValueError(f"cluster.time is missing: give the job's limit, {TIME_FORM}")
        if not 0 <= self.warn_seconds < 60 * self.minutes:
            raise ValueError(
                f"cluster.warn_seconds={self.warn_seconds} must be less than cluster.time={self.time}, and not negative"
            )
        for key in ("partition", "account", "qos", "constraint", "exclude", "container", "python"):
            if getattr(self, key) == "":
                raise ValueError(f"cluster.{key}= must not be empty (null: none)")
        if self.mounts and self.container is None:
            raise ValueError(f"cluster.mounts={self.mounts} are of a container: name it with cluster.container")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"cluster.environment.{name} is no name of a variable")
        for key, value in ((_option(key), value) for key, value in self.sbatch.items()):
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ValueError(f"cluster.sbatch.{key} is no option of sbatch")
            if isinstance(value, list | dict):
                raise ValueError(f"cluster.sbatch.{key}={value} must be a word, a number, true or false")
            if key in OWNED_KEYS:
                raise ValueError(f"cluster.sbatch.{key} is not to be given: use {OWNED_KEYS[key]}")

    @property
    def ranks_of_a_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_of_a_node

    @property
    def hardware(self) -> Hardware:
        """Hardware that a rank computes on."""
        return HARDWARE[self.gpu or "cpu"]

    @property
    def minutes(self) -> int:
        """Minutes of `time`, rounded up as Slurm does. Raises ValueError if it is not a time."""
        form = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", self.time)
        numbers = [int(number or 0) for number in form.groups()] if form else [0] * 4
        seconds = sum(number * unit for number, unit in zip(numbers, (86400, 3600, 60, 1), strict=True))
        if not seconds:
            raise ValueError(f"cluster.time={self.time} must be {TIME_FORM}")
        return math.ceil(seconds / 60)

    def describe(self) -> str:
        each = f"{self.ranks_of_a_node} ranks" if self.ranks_of_a_node > 1 else "1 rank"
        on_gpu = f" on {self.gpu}" if self.gpu else ""
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} × {each}{on_gpu}, at most {self.time}"

    def job(
        self,
        folder: Path,
        name: str,
        setup: list[str],
        mounts: list[Path],
        calls: Sequence[Callable[[], object]],
        options: Mapping[str, Any] | None = None,
    ) -> Job:
        """A job for each of the calls, with logs in `folder`; options: further ones of sbatch."""
        parameters = self.parameters(name, setup, mounts)
        parameters["additional_parameters"] |= options or {}
        return Job(folder, self.task_python, parameters, calls)

    def parameters(self, name: str, setup: list[str], mounts: list[Path]) -> dict[str, Any]:
        """Parameters of submitit's executor. `setup` comes after our lines; `mounts` is what the job needs."""
        threads = {"OMP_NUM_THREADS": str(self.cpus_per_task)}
        exports = [f"export {key}={shlex.quote(value)}" for key, value in (threads | self.environment).items()]
        further: dict[str, Any] = {"gres": f"gpu:{self.gpus_per_node}"} if self.gpus_per_node else {}
        further |= {"signal": f"USR1@{self.warn_seconds}", "requeue" if self.requeue else "no-requeue": True}
        further |= {_option(key): value for key, value in self.sbatch.items() if value not in (None, False)}
        srun = ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_task}"]  # srun 22.05 no longer inherits these
        if self.container is not None:
            everything = [*(f"{path}:{path}" for path in mounts), *self.mounts]
            srun += [f"--container-image={self.container}", f"--container-mounts={','.join(everything)}"]
        return {
            "job_name": name,
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_of_a_node,
            "cpus_per_task": self.cpus_per_task,
            "mem": self.memory,
            "time": self.minutes,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "setup": [*self.setup, *exports, *setup],
            "srun_args": srun,
            "stderr_to_stdout": True,
            "wckey": None,  # submitit's own would be refused where keys are checked
            "additional_parameters": further,
        }

    @property
    def task_python(self) -> str:
        return self.python or ("python3" if self.container else shlex.quote(sys.executable))


def register() -> None:
    """Tells Hydra the dataclass behind conf/cluster/*.yaml."""
    node = OmegaConf.structured(ClusterConfig)
    for key in ("environment", "sbatch"):
        OmegaConf.set_struct(node[key], False)  # they take keys that we do not know
    ConfigStore.instance().store(group="cluster/scheduler", name="slurm", node=node)


def need_cluster(composed: Container[object]) -> None:
    """Raises ValueError if the command names no cluster."""
    if "cluster" not in composed:
        names = ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
        raise ValueError(f"+cluster=NAME is missing; there are {names}")


def need_slurm(dry_run: bool) -> None:
    """Raises ValueError if jobs cannot be submitted."""
    if not dry_run and shutil.which("sbatch") is None:
        raise ValueError("sbatch is not here: run this on a login node of a Slurm cluster, or with dry_run=true")


def plain_path(key: str, path: str) -> Path:
    """A folder in full: a job may have another current one. Raises ValueError if Slurm would read it in its own way."""
    if not re.fullmatch(r"[\w@+=./-]+", path, re.ASCII):
        raise ValueError(f"{key}={path} must hold letters, digits and @+=./_- alone")
    return Path(os.path.abspath(path))


def _option(key: object) -> str:
    return str(key).replace("_", "-")

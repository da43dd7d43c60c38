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
    "open-mode": "nothing: a requeued job appends to its log",
    "array": "--multirun, or cluster.tasks if a corpus is tokenised",
}


@dataclass
class ClusterConfig:
    """Resources that a job requests from Slurm."""

    nodes: int = 1  # number of nodes
    gpus_per_node: int = 0  # GPUs asked of each node; 0: ranks compute on CPUs
    gpu: str | None = None  # model of the GPUs, a name in launch/hardware.py; null: no GPU
    tasks_per_node: int | None = None  # ranks per node; null: one per GPU, or one without GPUs
    cpus_per_task: int = 1  # CPU cores per rank
    tasks: int = 1  # array jobs that tokenise side by side; a training ignores it
    memory: str = "0"  # host memory per node, such as 400G; 0: all of it
    time: str = ""  # time limit of the job, HH:MM:SS or days-HH:MM:SS, such as 1-12:00:00; must be given
    partition: str | None = None  # sbatch's --partition; null: the cluster's default
    account: str | None = None  # sbatch's --account; null: the user's default
    qos: str | None = None  # sbatch's --qos; null: the default
    constraint: str | None = None  # sbatch's --constraint: features that nodes must have; null: none
    exclude: str | None = None  # sbatch's --exclude: nodes not to use, such as n[3-5],n9; null: none
    container: str | None = None  # image for srun's --container-image (pyxis); null: no container
    mounts: list[str] = field(default_factory=list)  # FROM:TO, mounted in the container besides the run and the data
    python: str | None = None  # command that starts Python in a task; null: this Python, or python3 in a container
    setup: list[str] = field(default_factory=list)  # shell lines of the job's script before the ranks start
    environment: dict[str, str] = field(default_factory=dict)  # environment variables of every rank
    warn_seconds: int = 120  # seconds before the time limit at which the job saves and stops
    requeue: bool = True  # requeue the job after a time limit, a preemption or a failure
    sbatch: dict[str, Any] = field(default_factory=dict)  # further options of sbatch, such as exclusive: true

    def __post_init__(self) -> None:
        leasts = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "tasks": 1}
        for key, least in leasts.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"cluster.{key}={value} must be at least {least}")
        gpus = [name for name, hardware in HARDWARE.items() if hardware.device == "cuda"]
        if self.gpus_per_node and self.gpu not in gpus:
            raise ValueError(
                f"cluster.gpu={self.gpu or 'null'} must be one of {', '.join(gpus)}, because"
                f" cluster.gpus_per_node={self.gpus_per_node}; for another GPU add a line to launch/hardware.py"
            )
        if not self.gpus_per_node and self.gpu is not None:
            raise ValueError(
                f"cluster.gpu={self.gpu} must be null, because cluster.gpus_per_node=0; give the GPUs of a node"
            )
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
            raise ValueError(f"cluster.mounts={self.mounts} need a container: set cluster.container")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"cluster.environment.{name} is not a valid variable name")
        for key, value in ((_option(key), value) for key, value in self.sbatch.items()):
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ValueError(f"cluster.sbatch.{key} is not an sbatch option")
            if isinstance(value, list | dict):
                raise ValueError(f"cluster.sbatch.{key}={value} must be a word, a number, true or false")
            if key in OWNED_KEYS:
                raise ValueError(f"cluster.sbatch.{key} cannot be set: use {OWNED_KEYS[key]}")

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
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} × {each}{on_gpu}"

    def job(
        self,
        folder: Path,
        name: str,
        setup: list[str],
        mounts: list[Path],
        calls: Sequence[Callable[[], object]],
        options: Mapping[str, Any] | None = None,
    ) -> Job:
        """Builds one job per call, with logs in `folder`. options: further options of sbatch."""
        parameters = self.parameters(name, setup, mounts)
        parameters["additional_parameters"] |= options or {}
        return Job(folder, self.task_python, parameters, calls)

    def parameters(self, name: str, setup: list[str], mounts: list[Path]) -> dict[str, Any]:
        """Builds submitit's parameters. `setup` comes last in the script; `mounts`: folders that the job needs."""
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
            "wckey": None,  # a cluster that checks keys would refuse submitit's own
            "additional_parameters": further,
        }

    @property
    def task_python(self) -> str:
        return self.python or ("python3" if self.container else shlex.quote(sys.executable))


def register() -> None:
    """Registers the dataclass of conf/cluster/*.yaml with Hydra."""
    node = OmegaConf.structured(ClusterConfig)
    for key in ("environment", "sbatch"):
        OmegaConf.set_struct(node[key], False)  # they accept any key
    ConfigStore.instance().store(group="cluster/scheduler", name="slurm", node=node)


def need_cluster(composed: Container[object]) -> None:
    """Raises ValueError if the command names no cluster."""
    if "cluster" not in composed:
        names = ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
        raise ValueError(
            f"+cluster=NAME is missing; there are {names}: each describes nodes and GPUs, and launch/plan.py needs no"
            " Slurm"
        )


def need_slurm(dry_run: bool) -> None:
    """Raises ValueError if this machine has no sbatch and jobs are to be submitted."""
    if not dry_run and shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not installed here: run this on a login node of a Slurm cluster, or with dry_run=true"
        )


def plain_path(key: str, path: str) -> Path:
    """Returns the absolute path: a job's current folder may differ. Raises ValueError if Slurm would change it."""
    if not re.fullmatch(r"[\w@+=./-]+", path, re.ASCII):
        raise ValueError(f"{key}={path} may have letters, digits and @+=./_- only")
    return Path(os.path.abspath(path))


def _option(key: object) -> str:
    return str(key).replace("_", "-")

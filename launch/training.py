"""Submits trainings to Slurm: checks, plans and rehearses each run, then submits all as one job.

slurm.py is the command, which composes the settings; corpus.py is the counterpart for tokenising.
"""

import json
import os
import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep import terminal
from data_prep.command import warn
from data_prep.durable import durable
from data_prep.mistakes import said
from data_prep.overrides import shown
from data_prep.progress import working
from launch import resume, site, sweep
from launch.cluster import ClusterConfig, need_cluster, need_slurm, plain_path
from launch.job import SlurmRank
from launch.job_state import JOB_FILE, holder_of
from launch.restart import RestartConfig
from launch.snapshot import Snapshot, import_from
from launch.submission import Job
from pretrain.checks import check_job, check_logs, finished
from pretrain.compose import build_config, config_text, freeze
from pretrain.config.job import JobConfig
from pretrain.corpora import vocab_rows
from pretrain.data import Data
from pretrain.locks import LAUNCH_LOCK, RANKS_LOCK, lock_run


@dataclass
class LaunchConfig:
    """Settings of the command besides the training."""

    cluster: ClusterConfig = MISSING  # the cluster, chosen with +cluster=NAME
    restart: RestartConfig = field(default_factory=RestartConfig)  # when a failed run is started again
    dry_run: bool = False  # print the script and the settings, and write nothing
    tail: bool = False  # follow the log until the job has ended for good, and exit with its code


@dataclass
class Run:
    """One training of the command."""

    config: JobConfig
    data: Data
    rows: int  # of the vocabulary
    model: str  # parameter counts, for the user

    @property
    def dir(self) -> Path:
        return self.config.run_dir


def launch(composed: sweep.Composed) -> list[submitit.Job[object]]:
    """Submits the composed runs, each with its overrides; with `dry_run` prints the job. Returns the job to follow.

    Raises ValueError if a setting is wrong.
    """
    configs = [config for config, _ in composed]
    ours = settings_of(configs)
    need_slurm(ours.dry_run)
    sweep.resumed(composed)
    site.check(ours.cluster, ours.dry_run)
    base = plain_path("run.dir", sweep.run_dir(composed))  # absolute: a job's current folder may differ
    for config, folder in zip(configs, sweep.folders(base, [overrides for _, overrides in composed]), strict=True):
        config.run.dir = str(folder)
    runs = [prepared(config, ours.cluster) for config in configs]
    if not ours.dry_run and (runs := unfinished(runs)) == []:
        return []
    snapshot = Snapshot.take()
    job = job_of(ours, base, runs, snapshot)
    if ours.dry_run:
        terminal.product()
        print(job.script())
        for run in runs:
            print(f"# {run.config.path}\n# model: {run.model}\n{config_text(run.config)}")
        return []
    jobs = submit(job, ours, base, runs, snapshot)
    return jobs if ours.tail else []


def settings_of(composed: list[DictConfig]) -> LaunchConfig:
    """Removes the settings of the launch from the composed configurations. Raises ValueError if they differ."""
    found = []
    for config in composed:
        OmegaConf.set_struct(config, False)
        need_cluster(config)
        given = {item.name: config.pop(item.name) for item in fields(LaunchConfig)}
        try:
            found.append(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LaunchConfig), given)))
        except OmegaConfBaseException as error:
            raise ValueError(said(str(error.full_key), error)) from error
    if any(launch_config != found[0] for launch_config in found):
        raise ValueError("--multirun is for settings of the training: one array has one cluster, restart and dry_run")
    ours = found[0]
    assert isinstance(ours, LaunchConfig)
    if ours.tail and len(found) > 1:
        raise ValueError("tail=true follows one job, not an array")
    if ours.cluster.tasks != 1:
        raise ValueError(
            f"cluster.tasks={ours.cluster.tasks} is for tokenising; ranks: cluster.nodes and cluster.tasks_per_node"
        )
    return ours


def prepared(composed: DictConfig, cluster: ClusterConfig) -> Run:
    """Checks, plans and rehearses a run for the cluster. Raises ValueError if a setting is wrong."""
    run = checked(composed, cluster)
    from launch.rehearsal import rehearse  # needs torch; wrong settings are reported without waiting for it

    with working("plan the memory and rehearse a step"):
        rehearse(run.config, run.rows, planned(run, cluster), cluster.ranks)
    return run


def checked(composed: DictConfig, cluster: ClusterConfig) -> Run:
    """Checks the settings of a run against its data and its checkpoint, if there is one."""
    resume.keep_decided(composed)
    config, hardware = build_config(composed), cluster.hardware
    config.resolve()
    of_nodes, config.data.cache = config.data.cache, ""  # this machine may not have the nodes' disk
    data = check_job(config, cluster.ranks, hardware.device, hardware.bf16, warn)
    config.data.cache = of_nodes
    check_logs(config, os.environ)
    rows = vocab_rows(config, data)
    from pretrain.announce import counts, parameters

    return Run(config, data, rows, parameters(config, *counts(config, rows), rows))


def planned(run: Run, cluster: ClusterConfig) -> int:
    """Returns the ranks per copy of the matrix. Raises ValueError if the cluster's GPU cannot hold the run."""
    from launch.fit import refusal
    from launch.planner import plan

    world, node, hardware = cluster.ranks, cluster.ranks_of_a_node, cluster.hardware
    planner = partial(plan, rows=run.rows, world=world, node=node, hardware=hardware)
    if cluster.gpu and (refused := refusal(run.config, world, planner, cluster.gpu, hardware)):
        raise ValueError(f"{refused}; launch/plan.py shows the memory in detail")
    return planner(run.config).chosen.ranks


def unfinished(runs: list[Run]) -> list[Run]:
    """Returns the unfinished runs. Prints one line for each finished run."""
    left = []
    for run in runs:
        done = finished(run.config, run.data)
        if done is None:
            left.append(run)
        else:
            print(done, flush=True)
    return left


def job_of(ours: LaunchConfig, base: Path, runs: list[Run], snapshot: Snapshot) -> Job:
    """Builds the Slurm job; for several runs an array."""
    mounts = sorted({base}.union(*(folders_of(path) for run in runs for path in run.config.reads)))
    lines = setup(runs, base / "code" / snapshot.name, ours.restart)
    return ours.cluster.job(base / "slurm", base.name, lines, mounts, [SlurmRank(str(run.config.path)) for run in runs])


def folders_of(path: Path) -> set[Path]:
    """Returns the folder and those of its links' targets: a container must mount both."""
    return {path.parent, *(file.resolve().parent for file in path.glob("*") if file.is_symlink())}


def setup(runs: list[Run], code: Path, restart: RestartConfig) -> list[str]:
    """Returns lines for the job's script: import the run's code, and decide about a restart at the end."""
    python, run = shlex.quote(sys.executable), str(runs[0].dir)
    lines = [import_from(code)]
    if len(runs) > 1:
        lines.append(f"runs=({' '.join(str(run.dir) for run in runs)})")
        run = "${runs[$SLURM_ARRAY_TASK_ID]}"
    close = f"{python} -m launch.job close {run} {restart.max_failures} {restart.delay}"
    return [*lines, f"trap {shlex.quote(f'{close} || exit 1')} EXIT"]


def submit(job: Job, ours: LaunchConfig, base: Path, runs: list[Run], snapshot: Snapshot) -> list[submitit.Job[object]]:
    """Freezes settings and code into the runs, submits the job, and prints what was submitted.

    Raises ValueError if a run is in use or Slurm refuses; then a new folder is removed.
    """
    for run in runs:
        refuse_if_held(run.dir)
    new = not base.exists()
    with ExitStack() as locks:
        try:
            for run in runs:
                locks.enter_context(lock_run(run.dir, LAUNCH_LOCK))
                refuse_if_held(run.dir)  # another launcher may have been faster
                with lock_run(run.dir, RANKS_LOCK):
                    freeze(run.config, run.data)
            snapshot.save(base / "code")
            jobs = job.submit()
        except (ValueError, OSError):
            if new:
                shutil.rmtree(base)
            raise
        for run, submitted in zip(runs, jobs, strict=True):
            record(run, submitted, snapshot)
        print(farewell(ours, base, runs, jobs), flush=True)  # last: the job is recorded even if the pipe is closed
    return jobs


def refuse_if_held(run: Path) -> None:
    """Raises ValueError if an earlier job of this run has not ended."""
    if job := holder_of(run):
        raise ValueError(f"run.dir={run} is in use by job {job}: wait for its end, or scancel {job}")


def record(run: Run, job: submitit.Job[object], snapshot: Snapshot) -> None:
    """Writes RUN/job.json: the job of the run, its log, and the code it runs."""
    known: dict[str, Any] = {"job": job.job_id, "submitted": round(time.time()), "log": str(job.paths.stdout)}
    known |= {"code": snapshot.name, "commit": snapshot.commit}
    with durable(run.dir / JOB_FILE) as file:
        file.write(json.dumps(known, indent=1).encode() + b"\n")


def farewell(ours: LaunchConfig, base: Path, runs: list[Run], jobs: list[submitit.Job[object]]) -> str:
    several, job = len(runs) > 1, jobs[0].job_id.split("_")[0]
    lines = [
        f"job: {job} ({f'{len(runs)} times ' if several else ''}{ours.cluster.describe()}, at most {ours.cluster.time})"
    ]
    for run, submitted in zip(runs, jobs, strict=True):
        lines += [f"run: {run.dir}", f"model: {run.model}", f"log: {submitted.paths.stdout}"]
    lines.append(f"curves: {shown('tensorboard', '--logdir', str(base if several else base.parent))}")
    return "\n".join([*lines, f"state: squeue -j {job}", f"cancel: scancel {job}"])

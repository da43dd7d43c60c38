"""Tokenising on a Slurm cluster: `python launch/slurm.py --config-name tokenize +cluster=cpu cluster.tasks=16 …`.

    prepare    one job     trains the tokenizer on the corpus, if it must be trained
      └ parts    an array    of cluster.tasks jobs: each tokenises its own part of the units
          └ manifest  one job     tokenises what is still missing, and writes the manifest

The parts are separate jobs, so a lost node costs one part. The last job starts when all parts have ended, failed ones
included, and does what they left. The parts start only if the preparation has succeeded; if it fails, Slurm removes
them from the queue. Every job may be requeued or submitted again: finished units are kept, and the token files equal
those of a run on one machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import submitit
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from data_prep import app, terminal
from data_prep.app import PREPARE, TokenizeConfig
from data_prep.durable import durable
from data_prep.encode import UNFINISHED_FOLDER
from data_prep.errors import DataError
from data_prep.tokenizer import BpeTokenizer
from launch import site
from launch.cluster import ClusterConfig, need_cluster, need_slurm, plain_path
from launch.job_state import JOB_FILE, holder_of
from launch.snapshot import Snapshot, import_from
from launch.submission import Job

PARTS, MANIFEST = "parts", "manifest"  # the steps' names, beside PREPARE
CODE = "code"
WARNING = signal.SIGUSR1  # comes cluster.warn_seconds before the time limit
LONGER_THAN_SLURM_WAITS = 86_400.0  # seconds, between the signals TERM and KILL


@dataclass
class TokenizeJobConfig(TokenizeConfig):
    """Settings of the command: the corpus to tokenise, the cluster, and how to submit."""

    cluster: ClusterConfig = MISSING  # the cluster, chosen with +cluster=NAME
    dry_run: bool = False  # print the scripts and the settings, and write nothing
    tail: bool = False  # follow the logs until the jobs have ended, and exit with their code

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(key is not None for key in (self.verify, self.stats, self.part)):
            raise DataError(
                "verify=, stats= and part= are for data_prep/tokenize.py: here cluster.tasks sets the number of parts"
            )
        if self.cluster.ranks != 1:
            raise DataError(
                f"cluster.nodes={self.cluster.nodes} × {self.cluster.ranks_of_a_node} tasks must be 1 × 1:"
                " cluster.tasks sets the number of parallel jobs"
            )

    @property
    def here(self) -> Path:
        """The output folder, as an absolute path."""
        assert self.out is not None
        return plain_path("out", self.out)

    @property
    def jobs(self) -> Path:
        """The folder of logs and code, beside the output, which then has the same bytes as without Slurm."""
        return self.here.with_name(f"{self.here.name}.slurm")

    def tokenizing(self) -> TokenizeConfig:
        """Returns the settings of a job, except its part."""
        known = {item.name: getattr(self, item.name) for item in fields(TokenizeConfig)}
        workers = self.workers or self.cluster.cpus_per_task
        return replace(TokenizeConfig(**known), out=str(self.here), workers=workers)


@dataclass(frozen=True)
class CorpusTask:
    """Tokenises inside a job, in the folder where the command was typed. Exits with the program's exit code.

    After SIGTERM it waits to be killed: Slurm restarts a preempted job only if it has not failed. Near the time limit
    it requeues itself, if it has finished a unit since its last start.
    """

    config: TokenizeConfig
    folder: str

    def __call__(self) -> None:
        terminal.begin()
        terminal.loaded()
        os.chdir(self.folder)
        signal.signal(signal.SIGTERM, lambda *_: time.sleep(LONGER_THAN_SLURM_WAITS))
        signal.pthread_sigmask(signal.SIG_BLOCK, [WARNING])  # in the processes that this one starts, too
        Thread(target=self._go_on_later, args=(self._done(),), daemon=True).start()
        sys.exit(app.execute(self.config))

    def _go_on_later(self, before: set[str]) -> None:
        signal.sigwait([WARNING])
        if self._done() > before:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)

    def _done(self) -> set[str]:
        """Returns the finished units of this task."""
        assert self.config.out is not None
        records = Path(self.config.out, UNFINISHED_FOLDER).glob("[0-9]*.json")
        return {record.stem for record in records if self.config.units.has(int(record.stem))}


@dataclass(frozen=True)
class JobStage:
    """One submission."""

    name: str
    parts: list[str | None]  # value of part= for each task
    after: Mapping[str, str] = field(default_factory=dict)  # how each earlier stage must have ended, by name

    def dependency(self, jobs: Mapping[str, str]) -> dict[str, Any]:
        """Builds the options of sbatch from the job ids of the earlier stages."""
        waits = [f"{how}:{jobs[name]}" for name, how in self.after.items() if name in jobs]
        return {"dependency": ",".join(waits), "kill-on-invalid-dep": "yes"} if waits else {}


def register() -> None:
    """Registers TokenizeJobConfig with Hydra as the keys of conf/tokenize.yaml."""
    app.register()
    ConfigStore.instance().store(name="tokenize_schema", node=TokenizeJobConfig)


def asked_for(composed: DictConfig) -> bool:
    """True if the command tokenises a corpus: Hydra has composed a TokenizeJobConfig."""
    return OmegaConf.get_type(composed) is TokenizeJobConfig


def launch(composed: list[DictConfig]) -> list[submitit.Job[object]]:
    """Submits the jobs, or prints their scripts if `dry_run`. With `tail`, returns the jobs to follow, in order.

    Raises ValueError if a setting is wrong.
    """
    if len(composed) > 1:
        raise ValueError("--multirun cannot be used for tokenising: one command writes one folder")
    need_cluster(composed[0])
    config = app.config_of(composed[0])
    assert isinstance(config, TokenizeJobConfig)
    need_slurm(config.dry_run)
    site.check(config.cluster, config.dry_run)
    output = app.output_of(config, config.here)
    if output.finished():
        app.tokenize(config, config.here)  # says so
        return []
    steps, snapshot = steps_of(config, output.prepared), Snapshot.take()
    if config.dry_run:
        terminal.product()
        names = {step.name: step.name.upper() for step in steps}  # placeholders for the job ids
        print(*(job_of(config, step, names, snapshot).script() for step in steps), sep="\n")
        return []
    refuse_if_held(config)
    if steps[0].name == PARTS:
        app.tokenize(replace(config.tokenizing(), part=PREPARE), config.here)
    snapshot.save(config.jobs / CODE)
    jobs = submit(config, steps, snapshot)
    with durable(config.jobs / JOB_FILE) as file:
        file.write(json.dumps({"job": ids_of(jobs)[MANIFEST]}).encode() + b"\n")
    print(farewell(config, jobs), flush=True)  # last: the jobs are recorded even if the pipe is closed
    return [each[0] for name, each in jobs.items() if name != PARTS] if config.tail else []


def steps_of(config: TokenizeJobConfig, prepared: bool) -> list[JobStage]:
    """Returns the stages to submit, in order. A single task needs no parts.

    A tokenizer that is not trained is prepared here and not by a job, because a download needs a network.
    """
    count = config.cluster.tasks
    last = JobStage(MANIFEST, [None], {PREPARE: "afterok", PARTS: "afterany"})
    if count == 1:
        return [last]
    parts = JobStage(PARTS, [f"{index}/{count}" for index in range(count)], {PREPARE: "afterok"})
    if prepared or not isinstance(config.tokenizer, BpeTokenizer):
        return [parts, last]
    return [JobStage(PREPARE, [PREPARE]), parts, last]


def job_of(config: TokenizeJobConfig, step: JobStage, jobs: Mapping[str, str], snapshot: Snapshot) -> Job:
    """Builds the job of a stage. jobs: ids of the earlier stages."""
    cwd, tokenizing = Path.cwd(), config.tokenizing()
    return config.cluster.job(
        folder=config.jobs,
        name=f"{config.here.name}-{step.name}",
        setup=[import_from(config.jobs / CODE / snapshot.name)],
        mounts=[config.here.parent, cwd],
        calls=[CorpusTask(replace(tokenizing, part=part), str(cwd)) for part in step.parts],
        options=step.dependency(jobs),
    )


def submit(
    config: TokenizeJobConfig, steps: list[JobStage], snapshot: Snapshot
) -> dict[str, list[submitit.Job[object]]]:
    """Submits all stages. If one is refused, cancels the earlier ones and raises."""
    jobs: dict[str, list[submitit.Job[object]]] = {}
    try:
        for step in steps:
            jobs[step.name] = job_of(config, step, ids_of(jobs), snapshot).submit()
    except BaseException:
        for job in chain.from_iterable(jobs.values()):
            job.cancel(check=False)
        raise
    return jobs


def ids_of(jobs: Mapping[str, list[submitit.Job[object]]]) -> dict[str, str]:
    """Returns the job id of each stage. An array has one id."""
    return {name: each[0].job_id.split("_")[0] for name, each in jobs.items()}


def refuse_if_held(config: TokenizeJobConfig) -> None:
    """Raises ValueError if a job of an earlier command has not ended."""
    if job := holder_of(config.jobs):
        raise ValueError(
            f"out={config.out} is in use by job {job} and the jobs it waits for: cancel them, or wait for its end"
        )


def farewell(config: TokenizeJobConfig, jobs: Mapping[str, list[submitit.Job[object]]]) -> str:
    ids = ids_of(jobs)
    each = f"{config.cluster.cpus_per_task} cores, at most {config.cluster.time}"
    return "\n".join(
        [
            f"out: {config.here}",
            *(f"{name}: job {job} ({len(jobs[name])} × {each})" for name, job in ids.items()),
            f"logs: {config.jobs}",
            f"state: squeue -j {','.join(ids.values())}",
            f"cancel: scancel {' '.join(ids.values())}",
        ]
    )

"""Tokenising on a Slurm cluster: `python launch/slurm.py --config-name tokenize +cluster=cpu cluster.tasks=16 …`.

    prepare    one job     the tokenizer, where it is trained from the corpus and not there yet
      └ parts    an array    of cluster.tasks jobs: each its own part of the units
          └ manifest  one job     whatever is still missing, and the manifest

Each is a job of its own, so a lost node costs its part alone. The last one waits for all parts to end, well or not:
where all went well it finds every unit done, else it does the rest itself. The parts need the preparation to end well,
for without a tokenizer there is no work; what waits for a job that failed so is taken off the queue. All of them may be
requeued or submitted again at any time: what is finished is not done twice, and the bytes are those of a plain run.
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
    """Settings of the command: a corpus to tokenise, where, and what becomes of the jobs."""

    cluster: ClusterConfig = MISSING
    dry_run: bool = False
    tail: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(key is not None for key in (self.verify, self.stats, self.part)):
            raise DataError(
                "verify=, stats= and part= are for data_prep/tokenize.py: here the jobs' parts are cluster.tasks"
            )
        if self.cluster.ranks != 1:
            raise DataError(
                f"cluster.nodes={self.cluster.nodes} × {self.cluster.ranks_of_a_node} tasks must be 1 × 1:"
                " what runs side by side is cluster.tasks"
            )

    @property
    def here(self) -> Path:
        """The folder to write, in full."""
        assert self.out is not None
        return plain_path("out", self.out)

    @property
    def jobs(self) -> Path:
        """Logs and code, beside the folder to write: that one holds the same bytes whoever made it."""
        return self.here.with_name(f"{self.here.name}.slurm")

    def tokenizing(self) -> TokenizeConfig:
        """Settings of a job, but for its part."""
        known = {item.name: getattr(self, item.name) for item in fields(TokenizeConfig)}
        workers = self.workers or self.cluster.cpus_per_task
        return replace(TokenizeConfig(**known), out=str(self.here), workers=workers)


@dataclass(frozen=True)
class CorpusTask:
    """Called in a job: tokenises, in the folder where the command was given, and exits as the program does.

    Told to end, it waits to be killed: Slurm starts a preempted job again, but not if it has failed on its own. Near
    its time limit it has itself started again, provided that it has finished a unit since its last start.
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
        """The units of this task that are finished."""
        assert self.config.out is not None
        records = Path(self.config.out, UNFINISHED_FOLDER).glob("[0-9]*.json")
        return {record.stem for record in records if self.config.units.has(int(record.stem))}


@dataclass(frozen=True)
class JobStage:
    """One submission."""

    name: str
    parts: list[str | None]  # of each of its tasks, as part=
    after: Mapping[str, str] = field(default_factory=dict)  # how each step before it must have ended, by name

    def dependency(self, jobs: Mapping[str, str]) -> dict[str, Any]:
        """Options of sbatch, by the ids of the steps that were submitted."""
        waits = [f"{how}:{jobs[name]}" for name, how in self.after.items() if name in jobs]
        return {"dependency": ",".join(waits), "kill-on-invalid-dep": "yes"} if waits else {}


def register() -> None:
    """Tells Hydra that, here, conf/tokenize.yaml has the keys of TokenizeJobConfig."""
    app.register()
    ConfigStore.instance().store(name="tokenize_schema", node=TokenizeJobConfig)


def asked_for(composed: DictConfig) -> bool:
    """True if a corpus is to be tokenised: then Hydra has composed a TokenizeJobConfig."""
    return OmegaConf.get_type(composed) is TokenizeJobConfig


def launch(composed: list[DictConfig]) -> list[submitit.Job[object]]:
    """Submits the jobs, or prints their scripts if `dry_run`. Returns those to follow, in order, if `tail` says so.

    Raises ValueError: key, value, rule.
    """
    if len(composed) > 1:
        raise ValueError("--multirun is not for tokenising: a command makes one folder")
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
        names = {step.name: step.name.upper() for step in steps}  # in place of numbers that are not known
        print(*(job_of(config, step, names, snapshot).script() for step in steps), sep="\n")
        return []
    refuse_if_held(config)
    if steps[0].name == PARTS:
        app.tokenize(replace(config.tokenizing(), part=PREPARE), config.here)
    snapshot.save(config.jobs / CODE)
    jobs = submit(config, steps, snapshot)
    with durable(config.jobs / JOB_FILE) as file:
        file.write(json.dumps({"job": ids_of(jobs)[MANIFEST]}).encode() + b"\n")
    print(farewell(config, jobs), flush=True)  # last: a closed pipe must not leave jobs that nobody knows of
    return [each[0] for name, each in jobs.items() if name != PARTS] if config.tail else []


def steps_of(config: TokenizeJobConfig, prepared: bool) -> list[JobStage]:
    """Stages to submit, in order. One task needs no parts.

    A tokenizer that is not trained is prepared here and not by a job: to download it takes a network.
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
    """A step as Slurm is handed it, given the ids of those before it."""
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
    """All steps or none: when one is refused, those before it are cancelled."""
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
    """An array has one id for all its tasks."""
    return {name: each[0].job_id.split("_")[0] for name, each in jobs.items()}


def refuse_if_held(config: TokenizeJobConfig) -> None:
    """Raises ValueError while the jobs of an earlier command have not ended; the last of them waits for all others."""
    if job := holder_of(config.jobs):
        raise ValueError(
            f"out={config.out} is held by job {job} and those it waits for: cancel them, or wait for its end"
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

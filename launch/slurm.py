#!/usr/bin/env python
"""Train on a Slurm cluster: `python launch/slurm.py --help`.

Composes the configuration once, checks it for the cluster's ranks, freezes it and the code into the run, and submits
one job, or a sweep as one array. What runs in the job is launch/job.py.
"""

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

import submitit  # noqa: E402
from hydra.core.config_store import ConfigStore  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import MISSING, DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from data_prep.command import one_line, run_hydra, warn  # noqa: E402
from data_prep.durable import durable  # noqa: E402
from data_prep.overrides import shown  # noqa: E402
from data_prep.terminal import EXIT_INTERRUPTED  # noqa: E402
from launch import cluster as slurm  # noqa: E402
from launch import corpus, resume, site  # noqa: E402
from launch.alone import alone  # noqa: E402
from launch.cluster import ClusterConfig  # noqa: E402
from launch.fit import refusal  # noqa: E402
from launch.hardware import HARDWARE  # noqa: E402
from launch.job import SlurmRank  # noqa: E402
from launch.plan import Plan, plan  # noqa: E402
from launch.rehearsal import rehearse  # noqa: E402
from launch.restart import RestartConfig  # noqa: E402
from launch.snapshot import Snapshot, import_from  # noqa: E402
from pretrain.announce import counts, parameters  # noqa: E402
from pretrain.build import vocab_rows  # noqa: E402
from pretrain.checks import check_job, check_logs, finished  # noqa: E402
from pretrain.compose import build_config, config_text, freeze, register_groups  # noqa: E402
from pretrain.config.job import JobConfig, RunConfig  # noqa: E402
from pretrain.data import Data  # noqa: E402
from pretrain.locks import LAUNCH_LOCK, RANKS_LOCK, lock_run  # noqa: E402

JOB_FILE = "job.json"  # of a run: the job that was submitted last
ASK_EVERY, LOOK_EVERY = 5.0, 0.5  # seconds: for the state of a job that is followed, and for its log
FORGOTTEN = "forgotten"


@dataclass
class LaunchConfig:
    """What the command says besides the training."""

    cluster: ClusterConfig = MISSING
    restart: RestartConfig = field(default_factory=RestartConfig)
    dry_run: bool = False
    tail: bool = False


@dataclass
class Run:
    """One training of the command. model: its parameter counts, in words."""

    config: JobConfig
    data: Data
    model: str

    @property
    def dir(self) -> Path:
        return self.config.run_dir


def main() -> None:
    """Exits 0 once submitted, with `tail` as the job does, 2 on a wrong setting."""
    alone()
    register_groups()
    slurm.register()
    corpus.register()
    ConfigStore.instance().store(group="restart", name="default", node=RestartConfig)
    with one_line():
        sys.argv[1:] = resume.in_full(sys.argv[1:])
    composed = compose()
    if not composed:  # --help and the like
        return
    with one_line():
        if corpus.asked_for(composed[0][0]):
            jobs = corpus.launch([one for one, _ in composed])
            sys.exit(next(filter(None, map(follow, jobs)), 0))  # none after one that has not ended well
        sys.exit(launch(*composed))


def compose() -> list[tuple[DictConfig, list[str]]]:
    """What Hydra makes of the command line, and the overrides of each: of a sweep there are several."""
    composed: list[tuple[DictConfig, list[str]]] = []

    def keep(one: DictConfig) -> None:
        composed.append((one, list(HydraConfig.get().overrides.task)))

    first = next((i for i, argument in enumerate(sys.argv) if re.match(r"[^-].*=", argument)), len(sys.argv))
    with TemporaryDirectory() as scratch:  # for a file of Hydra's
        sys.argv.insert(first, f"hydra.sweep.dir={scratch}")  # the overrides must stand together
        run_hydra(keep, "slurm", sweeps=True)
    return composed


def launch(*composed: tuple[DictConfig, list[str]]) -> int:
    """Checks everything, and submits it unless `dry_run`; the exit code. ValueError: key, value, rule."""
    ours = settings_of([one for one, _ in composed])
    if ours.cluster.tasks != 1:
        raise ValueError(
            f"cluster.tasks={ours.cluster.tasks} is for tokenising; ranks: cluster.nodes and cluster.tasks_per_node"
        )
    slurm.need_slurm(ours.dry_run)
    if len(composed) > 1 and any(one.resume for one, _ in composed):
        raise ValueError("resume is for one run: in a sweep each job has a folder of its own")
    for one, overrides in composed:
        resume.apply(one, overrides)
    site.check(ours.cluster, ours.dry_run)
    base = run_dir([one for one, _ in composed])
    for (one, _), name in zip(composed, names([overrides for _, overrides in composed]), strict=True):
        one.run.dir = str(base / name)
    runs = [checked(one, ours.cluster) for one, _ in composed]
    if not ours.dry_run and (runs := unfinished(runs)) == []:
        return 0
    snapshot = Snapshot.take()
    mounts = sorted({base}.union(*(folders_of(path) for run in runs for path in run.config.reads)))
    job = (
        base / "slurm",
        ours.cluster.task_python,
        ours.cluster.parameters(base.name, setup(runs, base / "code" / snapshot.name, ours.restart), mounts),
        [SlurmRank(str(run.config.path)) for run in runs],
    )
    if ours.dry_run:
        terminal.product()
        print(slurm.script(*job))
        for run in runs:
            print(f"# {run.config.path}\n# model: {run.model}\n{config_text(run.config)}")
        return 0
    for run in runs:
        refuse_if_held(run.dir)
    new = not base.exists()
    with ExitStack() as locks:
        try:
            for run in runs:
                locks.enter_context(lock_run(run.dir, LAUNCH_LOCK))
                refuse_if_held(run.dir)  # by a launcher that was quicker
                with lock_run(run.dir, RANKS_LOCK):
                    freeze(run.config, run.data)
            snapshot.save(base / "code")
            jobs = slurm.submit(*job)
        except (ValueError, OSError):
            if new:
                shutil.rmtree(base)
            raise
        for run, submitted in zip(runs, jobs, strict=True):
            record(run, submitted, snapshot)
        print(farewell(ours, base, runs, jobs), flush=True)  # last: a closed pipe must not leave a job unknown
    return follow(jobs[0]) if ours.tail else 0


def folders_of(path: Path) -> set[Path]:
    """Where a folder's files lie: links of a snapshot of the hub lead elsewhere, which a container must see, too."""
    return {path.parent, *(file.resolve().parent for file in path.glob("*") if file.is_symlink())}


def settings_of(composed: list[DictConfig]) -> LaunchConfig:
    """Takes what is not the training's out of the composed configurations. ValueError unless they agree on it."""
    found = []
    for one in composed:
        OmegaConf.set_struct(one, False)
        slurm.need_cluster(one)
        given = {item.name: one.pop(item.name) for item in fields(LaunchConfig)}
        try:
            found.append(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LaunchConfig), given)))
        except OmegaConfBaseException as error:
            raise ValueError(f"{error.full_key}: {error.msg}".splitlines()[0]) from error
    if any(other != found[0] for other in found):
        raise ValueError("--multirun is for settings of the training: one array has one cluster, restart and dry_run")
    ours = found[0]
    assert isinstance(ours, LaunchConfig)
    if ours.tail and len(found) > 1:
        raise ValueError("tail=true follows one job, not an array")
    return ours


def run_dir(composed: list[DictConfig]) -> Path:
    """run.dir in full: a job may have another current folder. ValueError where Slurm would read it in its own way."""
    given, *others = {one.run.dir for one in composed}
    RunConfig(given)
    if others:
        raise ValueError("run.dir is not to be swept: each job of a sweep has a folder of its own in it")
    return slurm.plain_path("run.dir", given)


def names(overrides: Sequence[list[str]]) -> list[str]:
    """A folder for each job of a sweep: the settings that not all have in common. Of a single job: none."""
    common = set.intersection(*map(set, overrides))
    own = ["_".join(one.lstrip("+") for one in job if one not in common) for job in overrides]
    found = [re.sub(r"[^\w.]", "-", name, flags=re.ASCII) for name in own]
    if len(set(found)) < len(found):
        raise ValueError(f"two jobs of this sweep would share the folder {max(found, key=found.count)}")
    return found


def checked(composed: DictConfig, cluster: ClusterConfig) -> Run:
    """A run that can be trained on that cluster, as far as can be known here. ValueError: key, value, rule."""
    config = build_config(composed)
    config.resolve()
    hardware = HARDWARE[cluster.gpu or "cpu"]
    data = check_job(config, cluster.ranks, hardware.device, hardware.bf16, warn)
    check_logs(config)
    rows = vocab_rows(config, data)

    def planned(changed: JobConfig) -> Plan:
        return plan(changed, rows, cluster.ranks, cluster.ranks_of_a_node, hardware)

    if cluster.gpu and (refused := refusal(config, cluster.ranks, planned, cluster.gpu, hardware)):
        raise ValueError(f"{refused}; launch/plan.py shows what it is")
    rehearse(config, rows, planned(config).chosen.ranks, cluster.ranks)
    return Run(config, data, parameters(config, *counts(config, rows), rows))


def unfinished(runs: list[Run]) -> list[Run]:
    """The runs that have something left to do; says so of the others."""
    left = []
    for run in runs:
        done = finished(run.config, run.data)
        if done is None:
            left.append(run)
        else:
            print(done, flush=True)
    return left


def setup(runs: list[Run], code: Path, restart: RestartConfig) -> list[str]:
    """Lines of the job's script: the run's own code, and who decides how it goes on when the ranks have ended."""
    python, run = shlex.quote(sys.executable), str(runs[0].dir)
    lines = [import_from(code)]
    if len(runs) > 1:
        lines.append(f"runs=({' '.join(str(run.dir) for run in runs)})")
        run = "${runs[$SLURM_ARRAY_TASK_ID]}"
    close = f"{python} -m launch.job close {run} {restart.without_progress} {restart.delay}"
    return [*lines, f"trap {shlex.quote(f'{close} || exit 1')} EXIT"]


def refuse_if_held(run: Path) -> None:
    """ValueError where a job that was submitted for this run has not ended yet."""
    try:
        job = json.loads((run / JOB_FILE).read_text())["job"]
    except FileNotFoundError:
        return
    if slurm.alive(job):
        raise ValueError(f"run.dir={run} is held by job {job}: wait for its end, or scancel {job}")


def record(run: Run, job: submitit.Job[object], snapshot: Snapshot) -> None:
    """RUN/job.json: which job has the run, where its log is, and what code it runs."""
    known: dict[str, Any] = {"job": job.job_id, "submitted": round(time.time()), "log": str(job.paths.stdout)}
    known |= {"code": snapshot.name, "commit": snapshot.commit}
    with durable(run.dir / JOB_FILE) as file:
        file.write(json.dumps(known, indent=1).encode() + b"\n")


def farewell(ours: LaunchConfig, base: Path, runs: list[Run], jobs: list[submitit.Job[object]]) -> str:
    several, job = len(runs) > 1, jobs[0].job_id.split("_")[0]
    lines = [f"job: {job} ({f'{len(runs)} times ' if several else ''}{ours.cluster.describe()})"]
    for run, submitted in zip(runs, jobs, strict=True):
        lines += [f"run: {run.dir}", f"model: {run.model}", f"log: {submitted.paths.stdout}"]
    lines.append(f"curves: {shown('tensorboard', '--logdir', str(base if several else base.parent))}")
    return "\n".join([*lines, f"state: squeue -j {job}", f"cancel: scancel {job}"])


def follow(job: submitit.Job[object]) -> int:
    """Prints the log as it grows until the job has ended for good, whatever requeues it; its exit code."""
    terminal.product()
    said, seen, ended, due = "", 0, 0, 0.0
    try:
        while ended < 2:  # a job that is requeued may seem to have ended for a moment
            if time.monotonic() >= due:
                now = _state(job.job_id)
                ended = ended + 1 if now == FORGOTTEN or now in slurm.ENDED else 0
                if now != said:
                    print(f"job {job.job_id}: {now}", file=sys.stderr, flush=True)
                said, due = now, time.monotonic() + ASK_EVERY
            seen = show(job.paths.stdout, seen)
            time.sleep(LOOK_EVERY)
    except KeyboardInterrupt:
        print(f"the job goes on; cancel: scancel {job.job_id}", file=sys.stderr)
        return EXIT_INTERRUPTED
    show(job.paths.stdout, seen)
    code = slurm.exit_code(job.job_id)
    if code is None:
        raise ValueError(f"Slurm has forgotten job {job.job_id}; its log: {job.paths.stdout}")
    return code


def _state(job: str) -> str:
    try:
        return slurm.state(job) or FORGOTTEN
    except OSError as error:  # a controller that is being restarted
        return str(error)


def show(log: Path, seen: int) -> int:
    """Prints what a log holds beyond the bytes that were seen; how many are seen now."""
    try:
        with open(log, "rb") as stream:
            stream.seek(seen)
            new = stream.read()
    except FileNotFoundError:
        return seen
    sys.stdout.buffer.write(new)
    sys.stdout.buffer.flush()
    return seen + len(new)


if __name__ == "__main__":
    main()

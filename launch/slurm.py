#!/usr/bin/env python
"""Train on a Slurm cluster: `python launch/slurm.py --help`.

Composes the configuration once, checks it for the cluster's ranks, freezes it and the code into the run, and submits
one job, or a sweep as one array. What runs in the job is launch/job.py.
"""

import json
import os
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
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
import torch  # noqa: E402
from hydra.core.config_store import ConfigStore  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import MISSING, DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from data_prep.command import EXIT_INTERRUPTED, fail, run_hydra  # noqa: E402
from data_prep.durable import durable  # noqa: E402
from launch import cluster as slurm  # noqa: E402
from launch.cluster import ClusterConfig  # noqa: E402
from launch.hardware import HARDWARE  # noqa: E402
from launch.job import RestartConfig, SlurmRank  # noqa: E402
from launch.snapshot import Snapshot  # noqa: E402
from pretrain import config as configuration  # noqa: E402
from pretrain.checkpoint import RANKS_LOCK  # noqa: E402
from pretrain.config import LAUNCH_LOCK, TrainConfig, hold  # noqa: E402
from pretrain.data import Corpus  # noqa: E402

CLUSTERS = ROOT / "conf" / "cluster"
JOB_FILE = "job.json"  # of a run: the job that was submitted last
ASK_EVERY = 5.0  # seconds, for the state of a job that is followed


@dataclass
class LaunchConfig:
    """What the command says besides the training."""

    cluster: ClusterConfig = MISSING
    restart: RestartConfig = field(default_factory=RestartConfig)
    dry_run: bool = False
    tail: bool = False


@dataclass
class Run:
    """One training of the command."""

    config: TrainConfig
    corpus: Corpus

    @property
    def dir(self) -> Path:
        return self.config.run_dir


def main() -> None:
    """Exits 0 once submitted, with `tail` as the job does, 2 on a wrong setting."""
    configuration.register()
    slurm.register()
    ConfigStore.instance().store(group="restart", name="default", node=RestartConfig)
    composed = compose()
    if not composed:  # --help and the like
        return
    try:
        sys.exit(launch(*composed))
    except (ValueError, OSError) as error:
        sys.exit(fail(str(error)))


def compose() -> list[tuple[DictConfig, list[str]]]:
    """What Hydra makes of the command line, and the overrides of each: of a sweep there are several."""
    composed: list[tuple[DictConfig, list[str]]] = []

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="slurm")
    def keep(one: DictConfig) -> None:
        composed.append((one, list(HydraConfig.get().overrides.task)))

    with TemporaryDirectory() as scratch:  # for a file of Hydra's
        sys.argv.append(f"hydra.sweep.dir={scratch}")
        run_hydra(keep, sweeps=True)
    return composed


def launch(*composed: tuple[DictConfig, list[str]]) -> int:
    """Checks everything, and submits it unless `dry_run`; the exit code. ValueError: key, value, rule."""
    settings = [settings_of(one) for one, _ in composed]
    ours, base = settings[0], run_dir(composed[0][0])
    if any(other != ours for other in settings):
        raise ValueError("--multirun is for settings of the training: an array has one cluster, restart and dry_run")
    if ours.tail and len(composed) > 1:
        raise ValueError("tail=true follows one job, not an array")
    if not ours.dry_run and shutil.which("sbatch") is None:
        raise ValueError("sbatch is not here: run this on a login node of a Slurm cluster, or with dry_run=true")
    for (one, _), name in zip(composed, names([overrides for _, overrides in composed]), strict=True):
        one.run.dir = str(base / name)
    runs = [checked(one, ours.cluster) for one, _ in composed]
    if len({run.dir for run in runs}) < len(runs):
        raise ValueError("two jobs of this sweep are the same")
    snapshot = Snapshot.take()
    folder = base / "slurm"
    mounts = [base, *{Path(run.config.data.path).parent for run in runs}]
    parameters = ours.cluster.parameters(base.name, setup(runs, base / "code" / snapshot.name), mounts)
    calls = [SlurmRank(str(run.config.path), ours.restart) for run in runs]
    job = (folder, ours.cluster.task_python, parameters, calls)
    if ours.dry_run:
        print(slurm.script(*job), *(f"# {run.config.path}\n{configuration.text(run.config)}" for run in runs), sep="\n")
        return 0
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(hold(run.dir, LAUNCH_LOCK))
            refuse_if_held(run.dir)
            with hold(run.dir, RANKS_LOCK):
                configuration.freeze(run.config, run.corpus)
        snapshot.save(base / "code")
        submitted = slurm.submit(*job)
        for run, one in zip(runs, submitted, strict=True):
            record(run, one.job_id, one.paths.stdout, snapshot)
    print(farewell(ours, base, runs, [one.job_id for one in submitted], [one.paths.stdout for one in submitted]))
    return follow(submitted[0].job_id, submitted[0].paths.stdout) if ours.tail else 0


def settings_of(composed: DictConfig) -> LaunchConfig:
    """Takes what is not the training's out of the composed configuration."""
    OmegaConf.set_struct(composed, False)
    if "cluster" not in composed:
        there = ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
        raise ValueError(f"+cluster=NAME is missing; there are {there}")
    given = {item.name: composed.pop(item.name) for item in fields(LaunchConfig)}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LaunchConfig), given))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {error.msg}".splitlines()[0]) from error


def run_dir(composed: DictConfig) -> Path:
    """run.dir in full: a job may have another current folder. ValueError where Slurm would read it in its own way."""
    configuration.RunConfig(composed.run.dir)
    if not re.fullmatch(r"[\w@+=:,./-]+", composed.run.dir, re.ASCII):
        raise ValueError(f"run.dir={composed.run.dir} must hold letters, digits and @+=:,./_- alone")
    return Path(os.path.abspath(composed.run.dir))


def names(overrides: Sequence[list[str]]) -> list[str]:
    """A folder for each job of a sweep: the settings that not all have in common. Of a single job: none."""
    common = set.intersection(*map(set, overrides))
    own = [",".join(one.lstrip("+") for one in job if one not in common) for job in overrides]
    return [re.sub(r"[^\w@+=:,.-]", "_", name, flags=re.ASCII) for name in own]


def checked(composed: DictConfig, cluster: ClusterConfig) -> Run:
    """A run that can be trained on that cluster, as far as can be known here. ValueError: key, value, rule."""
    config = configuration.build(composed)
    config.data.path = os.path.abspath(config.data.path)
    hardware = HARDWARE[cluster.gpu or "cpu"]
    corpus = configuration.check(config, cluster.ranks, hardware.device, hardware.bf16)
    with torch.device("meta"):
        config.model.body()
    return Run(config, corpus)


def setup(runs: list[Run], code: Path) -> list[str]:
    """Lines of the job's script: the run's own code, and who decides how it goes on when the ranks have ended."""
    python, run = shlex.quote(sys.executable), str(runs[0].dir)
    lines = [f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"]
    if len(runs) > 1:
        lines.append(f"runs=({' '.join(str(run.dir) for run in runs)})")
        run = "${runs[$SLURM_ARRAY_TASK_ID]}"
    return [*lines, f"trap {shlex.quote(f'{python} -m launch.job close {run}')} EXIT"]


def refuse_if_held(run: Path) -> None:
    """ValueError where a job that was submitted for this run has not ended yet."""
    try:
        job = json.loads((run / JOB_FILE).read_text())["job"]
    except FileNotFoundError:
        return
    if slurm.alive(job):
        raise ValueError(f"run.dir={run} is held by job {job}: wait for its end, or scancel {job}")


def record(run: Run, job: str, log: Path, snapshot: Snapshot) -> None:
    """RUN/job.json: which job has the run, where its log is, and what code it runs."""
    known: dict[str, Any] = {"job": job, "submitted": round(time.time()), "log": str(log)}
    known |= {"code": snapshot.name, "commit": snapshot.commit}
    with durable(run.dir / JOB_FILE) as file:
        file.write(json.dumps(known, indent=1).encode() + b"\n")


def farewell(settings: LaunchConfig, base: Path, runs: list[Run], jobs: list[str], logs: list[Path]) -> str:
    array = jobs[0].split("_")[0]
    each = [f"run: {run.dir}\nlog: {log}" for run, log in zip(runs, logs, strict=True)]
    what = f"{settings.cluster.describe()}{f', each of {len(runs)}' if len(runs) > 1 else ''}"
    return "\n".join(
        [
            f"job: {array} ({what})",
            *each,
            f"curves: tensorboard --logdir {base if len(runs) > 1 else base.parent}",
            f"state: squeue -j {array}",
            f"cancel: scancel {array}",
        ]
    )


def follow(job: str, log: Path) -> int:
    """Prints the log as it grows until the job has ended for good, whatever requeues it; its exit code."""
    seen, said, ended = 0, "", 0
    try:
        while ended < 2:  # a job that is requeued may seem to have ended for a moment
            asked = time.monotonic()
            try:
                now = slurm.state(job) or "forgotten"
            except OSError as error:
                now = str(error)
            ended = ended + 1 if now == "forgotten" or now in slurm.ENDED else 0
            while time.monotonic() - asked < ASK_EVERY:
                seen = show(log, seen)
                time.sleep(0.5)
            if now != said:
                print(f"job {job}: {now}", file=sys.stderr, flush=True)
            said = now
    except KeyboardInterrupt:
        print(f"the job goes on; cancel: scancel {job}", file=sys.stderr)
        return EXIT_INTERRUPTED
    show(log, seen)
    code = slurm.exit_code(job)
    if code is None:
        raise ValueError(f"Slurm has forgotten job {job}: how it ended is in {log}")
    return code


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

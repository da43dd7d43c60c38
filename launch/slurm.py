#!/usr/bin/env python
"""Train on a Slurm cluster: `python launch/slurm.py --help`.

Composes the configuration once. launch/training.py checks it for the cluster's ranks, freezes it and the code into the
run, and submits one job, or a sweep as one array. launch/job.py runs inside the job.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

from hydra.core.config_store import ConfigStore  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from data_prep.command import one_line, run_hydra  # noqa: E402
from launch import cluster, corpus, resume, training  # noqa: E402
from launch.alone import alone  # noqa: E402
from launch.job_state import follow  # noqa: E402
from launch.restart import RestartConfig  # noqa: E402
from pretrain.compose import register_groups  # noqa: E402


def main() -> None:
    """Exits with 0 once submitted, with `tail` as the job does, 2 if a setting is wrong."""
    alone()
    register_groups()
    cluster.register()
    corpus.register()
    ConfigStore.instance().store(group="restart", name="default", node=RestartConfig)
    with one_line():
        sys.argv[1:] = resume.in_full(sys.argv[1:])
    composed = compose()
    if not composed:  # --help and the like
        return
    with one_line():
        if corpus.asked_for(composed[0][0]):
            jobs = corpus.launch([config for config, _ in composed])
        else:
            jobs = training.launch(composed)
        sys.exit(next(filter(None, map(follow, jobs)), 0))  # no further job after one that failed


def compose() -> list[tuple[DictConfig, list[str]]]:
    """Composes the configurations of the command line, each with its overrides: a sweep has several."""
    composed: list[tuple[DictConfig, list[str]]] = []

    def keep(config: DictConfig) -> None:
        composed.append((config, list(HydraConfig.get().overrides.task)))

    first = next((i for i, argument in enumerate(sys.argv) if re.match(r"[^-].*=", argument)), len(sys.argv))
    with TemporaryDirectory() as scratch:  # Hydra writes a file there
        sys.argv.insert(first, f"hydra.sweep.dir={scratch}")  # Hydra needs all overrides together
        run_hydra(keep, "slurm", sweeps=True, frozen=resume.settings)
    return composed


if __name__ == "__main__":
    main()

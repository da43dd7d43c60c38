#!/usr/bin/env python
"""Train on a Slurm cluster: `python launch/slurm.py --help`.

Composes the configuration once. launch/training.py checks it for the cluster's ranks, freezes it and the code into the
run, and submits one job, or a sweep as one array. launch/job.py runs inside the job.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

from hydra.core.config_store import ConfigStore  # noqa: E402

from data_prep.command import one_line  # noqa: E402
from launch import cluster, corpus, resume, sweep, training  # noqa: E402
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
    composed = sweep.compose("slurm")
    if not composed:  # --help and the like
        return
    with one_line():
        if corpus.asked_for(composed[0][0]):
            jobs = corpus.launch([config for config, _ in composed])
        else:
            jobs = training.launch(composed)
        sys.exit(next(filter(None, map(follow, jobs)), 0))  # no further job after one that failed


if __name__ == "__main__":
    main()

"""Composes the runs of a command, one or those of a sweep (`--multirun`), and names their folders.

Not part of a launcher, because both use it: local.py trains the runs one after the other, slurm.py submits an array.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from data_prep.command import run_hydra
from data_prep.renamed import former
from launch import resume
from pretrain.config.job import RunConfig

Composed = list[tuple[DictConfig, list[str]]]  # the settings of each run, and its overrides


def compose(config_name: str) -> Composed:
    """Composes the runs of the command line; none after --help and the like."""
    composed: Composed = []

    def keep(config: DictConfig) -> None:
        composed.append((config, list(HydraConfig.get().overrides.task)))

    first = next((i for i, argument in enumerate(sys.argv) if re.match(r"[^-].*=", argument)), len(sys.argv))
    with TemporaryDirectory() as scratch:
        if any(re.match(r"-m|--mu", argument) for argument in sys.argv):  # Hydra writes a file there
            sys.argv.insert(first, f"hydra.sweep.dir={scratch}")  # Hydra needs all overrides together
        run_hydra(keep, config_name, sweeps=True, frozen=resume.settings)
    return composed


def resumed(composed: Composed) -> None:
    """Replaces the settings of a run that `resume` names by its own. Raises ValueError in a sweep."""
    if len(composed) > 1 and any(config.resume for config, _ in composed):
        raise ValueError("resume is for one run: in a sweep each job has its own folder")
    for config, overrides in composed:
        resume.apply(config, overrides)


def run_dir(composed: Composed) -> str:
    """Returns the common run.dir. Raises ValueError if it is missing or swept."""
    given, *others = {config.run.dir for config, _ in composed}
    RunConfig(given)
    if others:
        raise ValueError("run.dir cannot be swept: each job of a sweep has its own folder in it")
    return str(given)


def folders(base: Path, overrides: Sequence[list[str]]) -> list[Path]:
    """Returns the folder of each job: `base`, or in a sweep a folder inside. A folder that an earlier version named by
    a setting's old name is kept.
    """
    found = []
    for name, old in zip(names(overrides), names([list(map(former, job)) for job in overrides]), strict=True):
        found.append(base / (old if (base / old).exists() and not (base / name).exists() else name))
    return found


def names(overrides: Sequence[list[str]]) -> list[str]:
    """Names the folder of each job of a sweep by the settings in which they differ; "" for a single job."""
    common = set.intersection(*map(set, overrides))
    own = ["_".join(override.lstrip("+") for override in job if override not in common) for job in overrides]
    found = [re.sub(r"[^\w.]", "-", name, flags=re.ASCII) for name in own]
    if len(set(found)) < len(found):
        shared = max(found, key=found.count)
        raise ValueError(f"two jobs of this sweep would share {shared or 'run.dir'}: give each value once")
    return found

"""Trains and measures for the command coordinate_check.py. Separate from it because it needs torch."""

import os

import torch
import torch.distributed as dist

from data_prep.progress import working

from ..build import batch_loader, build_model, vocab_parallel
from ..checkpoint.state import TrainState
from ..checks import check_job
from ..config.job import JobConfig
from ..control import RunControl
from ..coordinate_check.points import Training
from ..coordinate_check.probe import Probe
from ..corpora import samples, vocab_rows
from ..data import Data
from ..hooks import Hook, StepReport
from ..hooks.base import TrainerView
from ..mesh import Mesh, ranks, ranks_of_a_node
from ..parts import ModelParts
from ..stops import StopReason, StopRequests
from ..trainer import Trainer
from .coordinate_check import LONGEST, Request

MOST = 10  # measurements during a training; more would take longer than its steps


class Measuring(Hook):
    """Measures at step 0, at most MOST times in between, and after the last step."""

    def __init__(self, probe: Probe, steps: int) -> None:
        self.probe, self.points, self.losses = probe, probe.measure(0), list[float]()
        self.steps, self.every = steps, -(-steps // MOST)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if report.step % self.every == 0 or report.step == self.steps:
            self.points += self.probe.measure(report.step)
        self.losses.append(report.loss)


def trained(request: Request) -> list[Training] | None:
    """Trains at each width and with each seed. Returns the measurements on the first rank, elsewhere None. Collective.

    Raises ValueError if a setting does not suit the data, the device or the ranks.
    """
    with ranks() as device, StopRequests() as requests:
        world = dist.get_world_size()
        checked = {
            key: check_job(config, world, device.type, environment=os.environ)
            for key, config in request.trainings.items()
        }
        found = []
        for (width, seed), config in request.trainings.items():
            with working(f"width {width}, seed {config.seed}"):
                found.append(train(width, seed, config, checked[width, seed], device, requests))
        return found if dist.get_rank() == 0 else None


def train(
    width: int, seed: int, config: JobConfig, data: Data, device: torch.device, requests: StopRequests
) -> Training:
    """Trains once. Raises KeyboardInterrupt if a signal stops it."""
    rows, world = vocab_rows(config, data), dist.get_world_size()
    parallel = vocab_parallel(config, rows, world, ranks_of_a_node(device), device.type)
    mesh = Mesh.of(parallel.ranks, device)
    parts = ModelParts(*build_model(config, mesh, rows), mesh)
    loader = batch_loader(config, data, mesh, parts.model.vocab)
    measuring = Measuring(probe_of(config, data, parts), config.train.steps)
    with RunControl(config.train, requests) as control:
        trainer = Trainer(parts, loader, config.train, config.optim, TrainState(), [measuring], control)
        reason = trainer.fit()
    loader.close()
    if reason is not StopReason.NONE:
        raise KeyboardInterrupt
    return Training(width, seed, measuring.points, measuring.losses)


def probe_of(config: JobConfig, data: Data, parts: ModelParts) -> Probe:
    """Returns the probe on the beginning of the run's first sample."""
    ((windows, index),) = samples(config, data).next({}, 1)
    window = windows[index]
    tokens, starts = (
        None if part is None else torch.from_numpy(part[:LONGEST])[None].to(parts.mesh.device)
        for part in (window.tokens_T, window.starts_T)
    )
    assert tokens is not None
    return Probe(parts.model, parts.engine.body, parts.mesh, tokens, starts)

"""Checkpoints on the way."""

from ..checkpoint.manager import CheckpointManager
from ..config.job import JobConfig
from .base import Hook, Run, StepReport, TrainerView


class CheckpointHook(Hook):
    """A checkpoint every few steps, 0 for none. An update waits until the save at work has copied what it changes."""

    def __init__(self, every: int, manager: CheckpointManager) -> None:
        self.every, self.manager = every, manager

    def before_update(self, trainer: TrainerView) -> None:
        self.manager.wait_for_copy()

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if self.every and report.step % self.every == 0:
            self.manager.save(trainer.state)


def build(config: JobConfig, run: Run) -> CheckpointHook:
    return CheckpointHook(config.checkpoint.every, run.manager)

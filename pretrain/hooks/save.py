"""Checkpoints during the run."""

from pathlib import Path

from ..config.job import JobConfig
from .base import Hook, Run, StepReport, TrainerView


class CheckpointHook(Hook):
    """A checkpoint every few steps, 0 for none. An update waits until a running save has copied the tensors."""

    def __init__(self, every: int, run: Run) -> None:
        self.every, self.run, self.manager = every, run, run.manager
        self._said: tuple[Path, float] | None = None

    def before_update(self, trainer: TrainerView) -> None:
        self.manager.wait_for_copy()

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if self.every and report.step % self.every == 0:
            self.manager.save(trainer.state)
        written = self.manager.written
        if self.run.log is not None and written is not None and written != self._said:  # ended since the last step
            self._said = written
            self.run.log.console.saved(*written)


def build(config: JobConfig, run: Run) -> CheckpointHook:
    return CheckpointHook(config.checkpoint.every, run)

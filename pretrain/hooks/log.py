"""Logging of a run's steps."""

from functools import reduce
from operator import add

import torch.distributed as dist

from ..config.job import JobConfig
from ..stops import StopReason
from ..vocab.collectives import on_host
from ..vocab.lookup import LookupTraffic
from .base import Hook, Run, StepReport, TrainerView


class LogHook(Hook):
    """Every few steps, on the last one, and whenever another hook has measured something, or a stop kept it from that.
    Rank 0 holds the log.
    """

    def __init__(self, every: int, run: Run) -> None:
        self.every, self.run = every, run
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0  # since the last logged step

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        self.tokens += report.tokens
        self.seconds += report.seconds
        self.waited += report.waited
        last = report.step == trainer.loop.last_step or trainer.reason is not StopReason.NONE
        if report.step % self.every and not report.scalars and not last:
            return
        dist.all_reduce(report.loss)
        scalars = {
            "step": report.step,
            "loss": float(on_host(report.loss)),
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens": trainer.state.tokens,
            "tokens_per_s": self.tokens / self.seconds,
            "data_wait": self.waited / self.seconds,
            **_of_corpora(trainer.batches.epochs()),
            **_of_lookups(report.lookups),
            **report.scalars,
        }
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0
        if self.run.log is not None:
            self.run.log.write(scalars, report.rows)


def _of_corpora(epochs: dict[str, float]) -> dict[str, float]:
    """How often the data has been gone through; of several corpora, each."""
    return (
        {f"epochs/{title}": gone for title, gone in epochs.items()}
        if len(epochs) > 1
        else {"epochs": sum(epochs.values())}
    )


def _of_lookups(lookups: list[LookupTraffic]) -> dict[str, float]:
    """How much less crossed the ranks than gather + reduce-scatter would move, and how evenly owners were asked."""
    if not lookups or not any(lookup.gathered for lookup in lookups):
        return {}  # one rank has the whole matrix
    step = reduce(add, lookups)
    return {"lookup_saved": step.saved, "lookup_balance": step.balance}


def build(config: JobConfig, run: Run) -> LogHook:
    return LogHook(config.log.every, run)

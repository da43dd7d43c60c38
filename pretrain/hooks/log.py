"""Logging of a run's steps."""

import resource
from functools import reduce
from operator import add

import torch
import torch.distributed as dist

from ..build import flops_per_token
from ..clocks import Clock, clock_of
from ..config.job import JobConfig
from ..corpora import vocab_rows
from ..peaks import peak_of
from ..precision import compute_dtype
from ..stops import StopReason
from ..timeline import DATA
from ..vocab.collectives import on_host
from ..vocab.lookup import LookupTraffic
from .base import Hook, Run, StepReport, TrainerView


class LogHook(Hook):
    """Logs every few steps, the first and the last step of each start, and each step on which another hook has measured
    something or a stop has kept it from measuring. Rank 0 holds the log.

    Logged steps: an all-reduce of the peak memory. The parts of such a step are this rank's, and missing if the step
    was not known to be logged when it began. capacity: tokens/s of all ranks at the peak of their matmuls; None if the
    peak is unknown.
    """

    def __init__(self, every: int, run: Run, capacity: float | None = None) -> None:
        self.every, self.run, self.capacity = every, run, capacity
        self._first = True
        self._unlogged: StepReport | None = None
        self.clock = Clock()
        self._begin()

    def _begin(self) -> None:
        """Resets the counts, after a logged step."""
        self.steps, self.tokens, self.seconds, self.waited = 0, 0, 0.0, 0.0

    def before_training(self, trainer: TrainerView) -> None:
        self.clock = clock_of(trainer.mesh.device)

        def watch(part: str) -> None:
            if part == DATA:
                self.clock.begin(measure=self._due(trainer, trainer.state.step + 1))
            self.clock.mark(part)

        trainer.model.timeline.watchers.append(watch)

    def _due(self, trainer: TrainerView, step: int) -> bool:
        """True if a step is logged whatever happens in it."""
        return self._first or step % self.every == 0 or step == trainer.loop.last_step

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        self.steps += 1
        self.tokens += report.tokens
        self.seconds += report.seconds
        self.waited += report.waited
        if self.run.log is not None:
            self.run.log.console.stepped(report.step, self.tokens / self.seconds)
        stops = trainer.reason is not StopReason.NONE
        if self._due(trainer, report.step) or report.scalars or stops:
            self._log(trainer, report)
        else:
            self._unlogged = report

    def after_training(self, trainer: TrainerView) -> None:
        """Logs the last step if a stop came after it."""
        if self._unlogged is not None and self._unlogged.step == trainer.state.step:  # else rolled back
            self._log(trainer, self._unlogged)

    def _log(self, trainer: TrainerView, report: StepReport) -> None:
        self._first, self._unlogged = False, None
        tokens_per_s = self.tokens / self.seconds
        scalars = {
            "step": report.step,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "tokens": trainer.state.tokens,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_rank": tokens_per_s / trainer.mesh.world,
            "step_s": self.seconds / self.steps,
            "peak_memory_gib": _peak_memory(trainer.mesh.device) / 2**30,
            **({"mfu": tokens_per_s / self.capacity} if self.capacity else {}),
            "data_wait": self.waited / self.seconds,
            **self.clock.seconds(),  # after the peak was read: a GPU has passed the marks
            **_of_corpora(trainer.batches.epochs()),
            **_of_lookups(report.lookups),
            **report.scalars,
        }
        self._begin()
        if self.run.log is not None:
            self.run.log.write(scalars, report.rows)


def _peak_memory(device: torch.device) -> float:
    """Most bytes that any rank has held so far: on its GPU, or resident on its host. One all-reduce of a number."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = torch.full((), held, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(on_host(most))


def _of_corpora(epochs: dict[str, float]) -> dict[str, float]:
    """Epochs of the data; with several corpora, of each."""
    return (
        {f"epochs/{title}": gone for title, gone in epochs.items()}
        if len(epochs) > 1
        else {"epochs": sum(epochs.values())}
    )


def _of_lookups(lookups: list[LookupTraffic]) -> dict[str, float]:
    """Traffic saved against gather + reduce-scatter, and how evenly the owners of the rows were asked."""
    if not lookups or not any(lookup.gathered for lookup in lookups):
        return {}  # one rank has the whole matrix
    step = reduce(add, lookups)
    return {"lookup_saved": step.saved, "lookup_balance": step.balance}


def build(config: JobConfig, run: Run) -> LogHook:
    """The hook. On a GPU whose peak is known it logs the model FLOPs utilisation, too."""
    mesh = run.parts.mesh
    name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    peak = peak_of(name, compute_dtype(config.train, mesh.device.type).itemsize)
    rounded = (
        compute_dtype(config.train, mesh.device.type).itemsize == 4
        and torch.get_float32_matmul_precision() != "highest"
    )
    if peak is None or rounded:  # matmuls of fp32 in TF32 have another peak
        return LogHook(config.log.every, run)
    return LogHook(config.log.every, run, mesh.world * peak / flops_per_token(config, vocab_rows(config, run.data)))

"""What is done after a step: evaluate, log, save, in this order."""

import math
from collections.abc import Callable, Iterator
from functools import reduce
from operator import add

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import CheckpointManager
from .config.evaluation import EvalConfig
from .data import IGNORED, MicroBatch
from .monitor import MetricsLog
from .stops import StopReason
from .trainer import StepReport, Trainer
from .vocab.collectives import on_host
from .vocab.lookup import LookupTraffic


class EvalHook:
    """Validation loss, and bits per byte of the validation text: comparable between tokenizers."""

    def __init__(
        self, config: EvalConfig, batches: dict[str, Callable[[], Iterator[MicroBatch]]], bytes_of_ids_V: Tensor
    ) -> None:
        """`batches`: of each corpus, by its title."""
        self.config, self.batches, self.bytes_of_ids_V = config, batches, bytes_of_ids_V

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if self._due(trainer):
            report.scalars |= self._measured(trainer)

    def catch_up(self, trainer: Trainer) -> dict[str, float]:
        """Before the first step of a run that is resumed: the evaluation that a stop has cut short, if one has."""
        missing = trainer.state.step and trainer.state.val_loss is None and self._due(trainer)
        return self._measured(trainer) if missing else {}

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.state.step
        return step == trainer.loop.steps or bool(self.config.every and step % self.config.every == 0)

    def _measured(self, trainer: Trainer) -> dict[str, float]:
        measured = self.measure(trainer)
        trainer.state.val_loss = measured.get("val_loss")
        return measured

    @torch.no_grad()
    def measure(self, trainer: Trainer) -> dict[str, float]:
        """val_loss in nats a token; val_bits_per_byte, of the bytes of the very targets that were scored. With several
        corpora of all their targets together, and of each. Nothing where the ranks must stop before the end.

        One all-reduce of three numbers a corpus, and one of one number a batch, besides the model's.
        """
        sums = torch.zeros(len(self.batches), 3, dtype=torch.float64, device=trainer.mesh.device)
        for corpus, batches in zip(sums, self.batches.values(), strict=True):
            for micro in batches():
                if trainer.must_stop():
                    return {}
                out = trainer.model.loss(micro.tokens_BT, micro.targets_BT, micro.starts_BT)
                counted_BT = micro.targets_BT != IGNORED  # as an index, this mask would wait for the device
                text_bytes = (self.bytes_of_ids_V[micro.targets_BT.clamp_min(0)] * counted_BT).sum()
                corpus += torch.stack([out.loss.double(), out.n_tokens.double(), text_bytes.double()])
        dist.all_reduce(sums)
        measured = {"": sums.sum(0)} | {f"/{title}": of for title, of in zip(self.batches, sums, strict=True)}
        scalars = {}
        for title, of in measured.items() if len(self.batches) > 1 else [("", sums[0])]:
            loss, tokens, text_bytes = on_host(of).tolist()
            scalars[f"val_loss{title}"] = loss / tokens
            scalars[f"val_bits_per_byte{title}"] = loss / math.log(2) / max(1.0, text_bytes)
        return scalars


class LogHook:
    """Every few steps, on the last one, and whenever another hook has measured something, or a stop kept it from that.
    Rank 0 holds the log.
    """

    def __init__(self, every: int, log: MetricsLog | None) -> None:
        self.every, self.log = every, log
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0  # since the last logged step

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
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
        if self.log is not None:
            self.log.write(scalars, report.rows)


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


class CheckpointHook:
    """A checkpoint every few steps. After `EvalHook`: what that has measured goes into it."""

    def __init__(self, every: int, manager: CheckpointManager) -> None:
        self.every, self.manager = every, manager

    def __call__(self, trainer: Trainer, report: StepReport) -> None:
        if report.step % self.every == 0:
            self.manager.save(trainer.state)

"""The training loop, with hooks around each step."""

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .checkpoint.state import TrainState
from .config.optim import OptimConfig
from .config.training import TrainingConfig
from .control import RunControl
from .data.loader import Batch, BatchLoader
from .hooks import Hook, StepReport
from .optim import clip_factor, lr_at, momentum_at, read_norm
from .parts import ModelParts
from .stops import StopReason
from .timeline import BACKWARD, DATA, FORWARD, HOOKS, OPTIMIZER
from .vocab.collectives import on_host


class Trainer:
    """One rank of a run. All ranks call `fit` together."""

    def __init__(
        self,
        parts: ModelParts,
        batches: BatchLoader,
        loop: TrainingConfig,
        optim: OptimConfig,
        state: TrainState,
        hooks: Sequence[Hook],
        control: RunControl,
    ) -> None:
        self.model, self.engine, self.mesh = parts.model, parts.engine, parts.mesh
        self.vocab_optimizer, self.mark = parts.vocab_optimizer, parts.model.timeline.mark
        self.batches, self.loop, self.optim, self.state = batches, loop, optim, state
        self.hooks, self.control, self.reason = hooks, control, StopReason.NONE

    def fit(self) -> StopReason:
        """Trains up to `loop.last_step`, or until any rank has a reason to stop. Returns the reason."""
        while self.state.step < self.loop.last_step and not self.reason:
            start = time.monotonic()
            self.mark(DATA)
            batch = next(self.batches)
            waited = time.monotonic() - start
            targets = self.agree(batch.n_targets)
            if self.reason:
                break
            self.mark(HOOKS)
            for hook in self.hooks:
                hook.before_step(self)
            report = self.train_step(batch, targets)
            if report is None:
                continue
            self.mark(HOOKS)
            report.seconds, report.waited = time.monotonic() - start, waited
            for hook in self.hooks:
                hook.after_step(self, report)
        for hook in self.hooks:
            hook.after_training(self)
        return self.reason

    def must_stop(self) -> bool:
        """True on all ranks as soon as one has a reason to stop. One small all-reduce. Rearms the watchdog."""
        self.agree(0)
        return self.reason is not StopReason.NONE

    def agree(self, number: int) -> int:
        """Returns the sum of the number over the ranks; sets `reason` to the highest reason that a rank has to stop.

        One all-reduce of five numbers, and one wait for the device. Rearms the watchdog.
        """
        self.control.alive()
        mine = max(self.reason, self.control.reason())
        counts = torch.zeros(1 + len(StopReason), dtype=torch.int64, device=self.mesh.device)
        counts[0].fill_(number)  # an assignment, or torch.tensor, would wait for the device
        counts[1 + mine].fill_(1)
        dist.all_reduce(counts)
        total, *reasons = on_host(counts).tolist()
        self.reason = max(reason for reason in StopReason if reasons[reason])
        return total

    def train_step(self, batch: Batch, targets: int) -> StepReport | None:
        """Does one optimizer step; returns None if a hook leaves the batch out. targets: of all ranks.

        Collectives besides the model's: two norms, the loss with one of them.
        """
        losses = []
        mine = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        scale = 1 / max(1, targets)
        with self.model.vocab.rows_unchanged():
            for i, micro in enumerate(batch.micro_batches):
                self.mark(FORWARD)
                part = self.model.loss(micro.tokens_BT, micro.targets_BT, micro.starts_BT, scale, micro.plan).loss
                self.mark(BACKWARD)
                self.engine.backward(part, last_micro_batch=i == len(batch.micro_batches) - 1)
                losses.append(part.detach())
                mine += losses[-1]
        self.mark(OPTIMIZER)
        self.vocab_optimizer.reduce_gradients()
        norm, loss = read_norm(self.engine.grad_norm(), self.vocab_optimizer.grad_norm(mine))
        lr = lr_at(self.optim, self.state.step, self.loop.steps, self.loop.clock)
        lookups = [micro.plan.traffic for micro in batch.micro_batches if micro.plan is not None]
        clip = clip_factor(norm, self.optim.clip)
        report = StepReport(self.state.step + 1, loss, norm, lr, targets, clip, losses, lookups)
        report.micro_batches = batch.micro_batches
        self.mark(HOOKS)
        if not all(hook.allows(self, report) for hook in self.hooks):
            self.engine.discard()
            self.vocab_optimizer.discard()
            self.state.samples |= self.batches.state_dict()
            return None
        _check_finite(report)
        for hook in self.hooks:
            hook.before_update(self)
        self.mark(OPTIMIZER)
        self.engine.step(lr, report.clip, momentum_at(self.optim, self.state.step))
        self.vocab_optimizer.step(lr, report.clip)
        self.state.step, self.state.val_loss = self.state.step + 1, None
        self.state.tokens += targets
        self.state.samples |= self.batches.state_dict()  # keeps the positions of other corpora
        return report


def _check_finite(report: StepReport) -> None:
    """Raises FloatingPointError if the norm or the loss is not finite: the update would destroy the weights."""
    if not (math.isfinite(report.grad_norm) and math.isfinite(report.loss)):
        raise FloatingPointError(
            f"the gradient's norm is {report.grad_norm} and the loss {report.loss} at step {report.step}: this step"
            " changed nothing; lower optim.lr or raise optim.warmup_steps, and resume from the last checkpoint"
        )

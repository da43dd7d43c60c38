"""The loop: batches in, steps out, hooks after each step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import TrainState
from .config.optim import OptimConfig
from .config.training import TrainingConfig
from .data import Batch, BatchLoader, MicroBatch
from .engine import Engine
from .mesh import Mesh
from .models.language_model import LanguageModel
from .optim import VocabOptimizer, clip_factor, lr_at
from .stops import StopCheck, StopReason
from .vocab.collectives import on_host
from .vocab.lookup import LookupTraffic
from .watchdog import Watchdog


@dataclass
class StepReport:
    """What one step measured. `loss` is this rank's part of it: the sum over ranks is the loss of the batch.

    tokens: targets in the global batch; lookups: the traffic of this vocab group's; seconds: from one step edge to the
    next, hooks left out; waited: of them, for the batch; scalars, rows: what hooks add for the log, the same on all
    ranks: numbers, and ids of rows of the matrix. micro_batches: of this rank.
    """

    step: int
    loss: Tensor
    grad_norm: float
    lr: float
    tokens: int
    lookups: list[LookupTraffic] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    scalars: dict[str, float] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    micro_batches: list[MicroBatch] = field(default_factory=list)


Hook = Callable[["Trainer", StepReport], None]


class Trainer:
    """One rank of a run. All ranks call `fit` together."""

    def __init__(
        self,
        model: LanguageModel,
        engine: Engine,
        matrix: VocabOptimizer,
        batches: BatchLoader,
        mesh: Mesh,
        loop: TrainingConfig,
        optim: OptimConfig,
        state: TrainState,
        hooks: list[Hook],
        stops: list[StopCheck],
        before_update: Callable[[], None],
        watchdog: Watchdog,
    ) -> None:
        self.model, self.engine, self.matrix, self.batches, self.mesh = model, engine, matrix, batches, mesh
        self.loop, self.optim, self.state, self.hooks, self.stops = loop, optim, state, hooks, stops
        self.before_update = before_update  # a save may still be reading what an update changes
        self.watchdog, self.reason = watchdog, StopReason.NONE

    def fit(self) -> StopReason:
        """Trains to `loop.last_step`, or to the first step edge where any rank has a reason to stop, and gives it."""
        while self.state.step < self.loop.last_step and not self.must_stop():
            start = time.monotonic()
            batch = next(self.batches)
            waited = time.monotonic() - start
            self.untie_when_due()
            report = self.train_step(batch)
            report.seconds, report.waited = time.monotonic() - start, waited
            for hook in self.hooks:
                hook(self, report)
        return self.reason

    def untie_when_due(self) -> None:
        """Splits the matrix before step vocab.untie_at + 1: a checkpoint of step untie_at still has it whole."""
        vocab = self.model.vocab
        due = vocab.config.untie_at == self.state.step
        if due and vocab.head_weight is None:
            self.before_update()  # a save at work asks for the matrices by name
            self.matrix.add_copy(vocab.untie(), vocab.weight)

    def must_stop(self) -> bool:
        """True on all ranks as soon as one of them has a reason to stop. One all-reduce of a number; a sign of life."""
        self.watchdog.alive()
        if not self.reason:
            mine = max([reason for reason, stop in self.stops if stop()], default=StopReason.NONE)
            agreed = torch.full((), int(mine), device=self.mesh.device)  # torch.tensor would wait for the device
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            self.reason = StopReason(int(on_host(agreed)))
        return self.reason is not StopReason.NONE

    def train_step(self, batch: Batch) -> StepReport:
        """One optimizer step. Besides the model's collectives: the count of targets, and two norms."""
        targets = self._sum(batch.n_targets)
        loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for i, micro in enumerate(batch.micro_batches):
            scale = 1 / max(1, targets)
            part = self.model.loss(micro.tokens_BT, micro.targets_BT, micro.starts_BT, scale, micro.plan).loss
            self.engine.backward(part, last_micro_batch=i == len(batch.micro_batches) - 1)
            loss += part.detach()
        self.matrix.reduce_gradients()
        norm, factor = clip_factor(self.engine.grad_norm(), self.matrix.grad_norm(), self.optim.clip)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} at step {self.state.step + 1}: nothing was changed by this step;"
                " lower optim.lr or raise optim.warmup_steps, and run again from the last checkpoint"
            )
        lr = lr_at(self.optim, self.state.step, self.loop.steps)
        self.before_update()
        self.engine.step(lr, factor)
        self.matrix.step(lr, factor)
        self.state.step, self.state.val_loss = self.state.step + 1, None
        self.state.tokens += targets
        self.state.samples |= self.batches.state_dict()  # those of other corpora stay
        lookups = [micro.plan.traffic for micro in batch.micro_batches if micro.plan is not None]
        return StepReport(self.state.step, loss, norm, lr, targets, lookups, micro_batches=batch.micro_batches)

    def _sum(self, number: int) -> int:
        total = torch.full((), number, device=self.mesh.device)
        dist.all_reduce(total)
        return int(on_host(total))

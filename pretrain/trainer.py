"""The loop: batches in, steps out, hooks after each step."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import TrainState
from .data import Batch, BatchLoader, MicroBatch
from .engine import Engine
from .mesh import Mesh
from .models.language_model import LanguageModel
from .optim import OptimConfig, VocabOptimizer, clip_factor
from .stops import StopCheck, StopReason
from .vocab.collectives import on_host
from .vocab.lookup import LookupTraffic
from .watchdog import Watchdog


@dataclass
class TrainingConfig:
    """steps: length of the schedule. stop_after: stop at this step, saved (null: at the end). time_limit: stop and save
    before the ranks have run for so long, such as 4h or 1d12h30m (null: no limit).

    hang_after: seconds without a finished step, evaluation batch or save after which a rank ends itself, its stacks on
    stderr (0: never).

    seq_len: tokens a sequence; null: the model's context, at most 8192. global_batch: sequences a step, over all ranks;
    micro_batch: sequences a rank has in work at once. precision: bf16, fp32, or auto: bf16 where the device computes
    it natively.
    """

    steps: int = 1000
    stop_after: int | None = None
    time_limit: str | None = None
    hang_after: float = 1800.0
    seq_len: int | None = None
    global_batch: int = 32
    micro_batch: int = 4
    precision: str = "auto"

    def __post_init__(self) -> None:
        for key in ("steps", "seq_len", "global_batch", "micro_batch"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"train.{key}={getattr(self, key)} must be at least 1")
        if self.stop_after is not None and self.stop_after < 0:
            raise ValueError(f"train.stop_after={self.stop_after} must not be negative (null: run to the end)")
        if self.time_limit is not None and self.time_limit_seconds is None:
            raise ValueError(f"train.time_limit={self.time_limit} must be a time such as 4h, 90m or 1d12h (null: none)")
        if not self.hang_after >= 0:
            raise ValueError(f"train.hang_after={self.hang_after} must not be negative (0: never)")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"train.micro_batch={self.micro_batch} must divide train.global_batch={self.global_batch}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"train.precision={self.precision} must be auto, bf16 or fp32")

    def compute_dtype(self, device_type: str, bf16: bool | None = None) -> torch.dtype:
        """What matmuls run in. ValueError where bf16 is asked of a processor that only emulates it.

        bf16: whether the device computes it natively; None: this machine's is asked.
        """
        native = bf16 if bf16 is not None else _computes_bf16(device_type)
        if self.precision == "bf16" and not native:
            raise ValueError(f"train.precision=bf16: this {device_type} does not compute it natively; use fp32 or auto")
        return torch.bfloat16 if native and self.precision != "fp32" else torch.float32

    def check_world(self, world: int) -> None:
        """Raises ValueError unless the global batch can be dealt to that many ranks in whole micro-batches."""
        if self.global_batch % (self.micro_batch * world):
            raise ValueError(
                f"train.micro_batch={self.micro_batch} × {world} ranks = {self.micro_batch * world}"
                f" must divide train.global_batch={self.global_batch}"
            )

    @property
    def time_limit_seconds(self) -> int | None:
        form = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.time_limit or "")
        if form is None or not self.time_limit:
            return None
        days, hours, minutes, seconds = (int(number or 0) for number in form.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def last_step(self) -> int:
        """Where this launch stops."""
        return self.steps if self.stop_after is None else min(self.stop_after, self.steps)


def _computes_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))


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
        lr = self.optim.lr_at(self.state.step, self.loop.steps)
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

"""The loop: batches in, steps out, hooks after each step."""

import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import reduce
from operator import add
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import CheckpointManager, TrainState
from .data import IGNORED, Batch, BatchLoader, MicroBatch
from .engine import Engine
from .mesh import Mesh
from .model import LanguageModel
from .monitor import MetricsLog
from .optim import MatrixOptimizer, OptimConfig, clip_factor
from .vocab import LookupTraffic
from .watchdog import Watchdog


@dataclass
class LoopConfig:
    """steps: length of the schedule. stop_after: stop at this step, saved (null: at the end). time_limit: stop and save
    before the ranks have run for so long, such as 4h or 1d12h30m (null: no limit).

    hang_after: seconds without a finished step, evaluation batch or save after which a rank ends itself, its stacks on
    stderr (0: never).

    seq_len: tokens a sequence; null: the model's context. global_batch: sequences a step, over all ranks;
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
class EvalConfig:
    """every: steps between evaluations, 0 for only the last. max_windows: of the validation split, 0 for all."""

    every: int = 250
    max_windows: int = 0

    def __post_init__(self) -> None:
        for key in ("every", "max_windows"):
            if getattr(self, key) < 0:
                raise ValueError(f"eval.{key}={getattr(self, key)} must not be negative")


@dataclass
class Report:
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


Hook = Callable[["Trainer", Report], None]


class Reason(IntEnum):
    """Why all ranks stop; of several, the highest counts."""

    NONE = 0
    TIME_LIMIT = 1  # train.time_limit: this launch is where it was meant to get
    REQUESTED = 2  # a signal, or the end of the job is near: to be gone on with
    UNSAVED = 3  # a save in the background has failed


Stop = tuple[Reason, Callable[[], bool]]  # asked by each rank at each step edge: whether there is that reason


class StopFlag:
    """Raised by a signal that asks to stop, while the context lasts. No more than that: a collective in a handler
    deadlocks. A launcher may have blocked the signals: one that came before the context is seen as soon as it begins.

    after: what the signals do once the context has ended; None: what they did before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self, after: signal.Handlers | None = None) -> None:
        self.raised, self.after = False, after

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._raise) for number in self.SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if self.after is None else self.after)

    def __call__(self) -> bool:
        return self.raised

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True


class Deadline:
    """Says to stop as long before `at`, a unix time, as it takes: for a step and a save that has to wait for another.

    Of both it takes the longest so far, and half as much again; but never less than `reserve` seconds.
    """

    def __init__(self, at: float, reserve: float, longest_save: Callable[[], float]) -> None:
        self.at, self.reserve, self.longest_save = at, reserve, longest_save
        self._edge, self._longest_step = time.monotonic(), 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        self._edge, self._longest_step = now, max(self._longest_step, now - self._edge)
        return time.time() + max(self.reserve, 1.5 * (self._longest_step + 2 * self.longest_save())) >= self.at


class Trainer:
    """One rank of a run. All ranks call `fit` together."""

    def __init__(
        self,
        model: LanguageModel,
        engine: Engine,
        matrix: MatrixOptimizer,
        batches: BatchLoader,
        mesh: Mesh,
        loop: LoopConfig,
        optim: OptimConfig,
        state: TrainState,
        hooks: list[Hook],
        stops: list[Stop],
        before_update: Callable[[], None],
        watchdog: Watchdog,
    ) -> None:
        self.model, self.engine, self.matrix, self.batches, self.mesh = model, engine, matrix, batches, mesh
        self.loop, self.optim, self.state, self.hooks, self.stops = loop, optim, state, hooks, stops
        self.before_update = before_update  # a save may still be reading what an update changes
        self.watchdog, self.reason = watchdog, Reason.NONE

    def fit(self) -> Reason:
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
            mine = max([reason for reason, stop in self.stops if stop()], default=Reason.NONE)
            agreed = torch.tensor(int(mine), device=self.mesh.device)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            self.reason = Reason(int(agreed))
        return self.reason is not Reason.NONE

    def train_step(self, batch: Batch) -> Report:
        """One optimizer step. Besides the model's collectives: the count of targets, and two norms."""
        targets = self._sum(batch.n_targets)
        loss = torch.zeros((), device=self.mesh.device)
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
        return Report(self.state.step, loss, norm, lr, targets, lookups, micro_batches=batch.micro_batches)

    def _sum(self, number: int) -> int:
        total = torch.tensor(number, device=self.mesh.device)
        dist.all_reduce(total)
        return int(total)


class Evaluate:
    """Validation loss, and bits per byte of the validation text: comparable between tokenizers."""

    def __init__(
        self, config: EvalConfig, batches: dict[str, Callable[[], Iterator[MicroBatch]]], bytes_of_ids_V: Tensor
    ) -> None:
        """`batches`: of each corpus, by its title."""
        self.config, self.batches, self.bytes_of_ids_V = config, batches, bytes_of_ids_V

    def __call__(self, trainer: Trainer, report: Report) -> None:
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
                text_bytes = self.bytes_of_ids_V[micro.targets_BT[micro.targets_BT != IGNORED]].sum()
                corpus += torch.stack([out.loss.double(), out.n_tokens.double(), text_bytes.double()])
        dist.all_reduce(sums)
        measured = {"": sums.sum(0)} | {f"/{title}": of for title, of in zip(self.batches, sums, strict=True)}
        scalars = {}
        for title, of in measured.items() if len(self.batches) > 1 else [("", sums[0])]:
            loss, tokens, text_bytes = of.tolist()
            scalars[f"val_loss{title}"] = loss / tokens
            scalars[f"val_bits_per_byte{title}"] = loss / math.log(2) / max(1.0, text_bytes)
        return scalars


class Log:
    """Every few steps, on the last one, and whenever another hook has measured something, or a stop kept it from that.
    Rank 0 holds the log.
    """

    def __init__(self, every: int, log: MetricsLog | None) -> None:
        self.every, self.log = every, log
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0  # since the last logged step

    def __call__(self, trainer: Trainer, report: Report) -> None:
        self.tokens += report.tokens
        self.seconds += report.seconds
        self.waited += report.waited
        last = report.step == trainer.loop.last_step or trainer.reason is not Reason.NONE
        if report.step % self.every and not report.scalars and not last:
            return
        dist.all_reduce(report.loss)
        scalars = {
            "step": report.step,
            "loss": float(report.loss),
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


class Save:
    """A checkpoint every few steps. After `Evaluate`: what that has measured goes into it."""

    def __init__(self, every: int, manager: CheckpointManager) -> None:
        self.every, self.manager = every, manager

    def __call__(self, trainer: Trainer, report: Report) -> None:
        if report.step % self.every == 0:
            self.manager.save(trainer.state)

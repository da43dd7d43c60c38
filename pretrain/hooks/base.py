"""Interface of a hook: when it is called, and what it is built from."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..checkpoint.manager import CheckpointManager
from ..checkpoint.state import HookState, TrainState
from ..config.training import TrainingConfig
from ..data import Data
from ..data.loader import BatchLoader, MicroBatch
from ..engine import Engine
from ..mesh import Mesh
from ..models.language_model import LanguageModel
from ..monitor import MetricsLog
from ..optim import VocabOptimizer
from ..parts import ModelParts
from ..stops import StopReason
from ..vocab.lookup import LookupTraffic


@dataclass
class StepReport:
    """Measurements of one step, and values that hooks add for the log. Equal on all ranks."""

    step: int
    loss: float  # of the global batch
    grad_norm: float
    lr: float
    tokens: int  # targets in the global batch
    clip: float = 1.0  # factor by which the update scales the gradient; a hook may lower it in `allows`
    losses: list[Tensor] = field(default_factory=list)  # of this rank's micro-batches, on the device: parts of `loss`
    lookups: list[LookupTraffic] = field(default_factory=list)  # of this vocab group
    seconds: float = 0.0  # wall time of the step without hooks
    waited: float = 0.0  # part of `seconds` that the step waited for its batch
    scalars: dict[str, float] = field(default_factory=dict)  # added by hooks: numbers
    rows: dict[str, list[int]] = field(default_factory=dict)  # added by hooks: ids of rows of the matrix
    micro_batches: list[MicroBatch] = field(default_factory=list)  # of this rank


class TrainerView(Protocol):
    """Parts of the trainer that a hook may use."""

    model: LanguageModel
    engine: Engine
    vocab_optimizer: VocabOptimizer
    mesh: Mesh
    batches: BatchLoader
    loop: TrainingConfig
    state: TrainState
    reason: StopReason

    def must_stop(self) -> bool: ...


class Hook:
    """Acts at the moments of a run that a subclass overrides. All ranks call the hooks together, in the order of the
    registry, so a hook may run collectives.
    """

    def before_training(self, trainer: TrainerView) -> None:
        """Called once per start, after the log was opened; also if no step is left."""

    def before_step(self, trainer: TrainerView) -> None:
        """Called before forward and backward. `trainer.state.step` steps are done."""

    def allows(self, trainer: TrainerView, report: StepReport) -> bool:
        """Called between backward and update, before `before_update`. False leaves the batch out: nothing changes, its
        samples count as consumed, and the next batch repeats the step. Must be equal on all ranks.
        """
        return True

    def before_update(self, trainer: TrainerView) -> None:
        """Called between backward and update: gradients are summed and not yet clipped, no weight has changed."""

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        """Called after the update. Adds values for the log to the report."""

    def after_training(self, trainer: TrainerView) -> None:
        """Called once per start, after the last step, before the last save; also if no step was left."""

    def state_dict(self) -> HookState:
        """Returns the state to save, by names that begin with `monitor.` or `ema.`: DTensors, numbers, lists of them.

        Numbers go into the manifest. Called at each save, and before a load, which fills the tensors in place. A save
        may read them until the update of the next step, so do not change them in place before it.
        """
        return {}

    def load_state_dict(self, state: HookState) -> None:
        """Restores the parts of `state_dict` that the checkpoint has: tensors filled in place, and numbers. Not called
        if it has none.
        """


@dataclass
class Run:
    """Parts of this rank's run from which hooks are built."""

    data: Data
    parts: ModelParts
    manager: CheckpointManager
    log: MetricsLog | None = None  # rank 0's; open from `before_training` on
    #: other weights to evaluate, by the suffix of their scalars: a context in which the model has them
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = field(default_factory=dict)
    ends: list[Callable[[], None]] = field(default_factory=list)  # called at the end of this start, also by an error

    def close(self) -> None:
        for end in self.ends:
            end()
        self.manager.close()
        if self.log is not None:
            self.log.close()

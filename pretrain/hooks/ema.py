"""Keeps an exponential moving average of the weights (Polyak & Juditsky, 1992) beside each rank's shards."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoint.state import HookState, matrix_dtensor
from ..config.ema import AVERAGE, EmaConfig
from ..config.job import JobConfig
from ..optim import saved_name
from ..parts import ModelParts
from .base import Hook, Run, StepReport, TrainerView

MASS = f"{AVERAGE}.mass"  # its name in a checkpoint's manifest


class EmaHook(Hook):
    """After n updates the average is Σ d^(n-i)·w_i / Σ d^(n-i), i = 1 … n, with d = decay^every: the weights before the
    first update take no part, as in Adam's bias correction. Before the first update it is a copy of the weights.

    The optimizers hold the tensors, so a split of the matrix copies the average as well. Updates are local. mass: sum
    of the factors, (1 - d)·Σ d^(n-i), below 1.
    """

    def __init__(self, config: EmaConfig, parts: ModelParts) -> None:
        assert config.decay is not None
        self.every, self.decay, self.parts = config.every, config.decay**config.every, parts
        self.mass, self._loaded = 0.0, False

    def before_training(self, trainer: TrainerView) -> None:
        if not self._loaded:  # a new run, or one that had no average so far
            self._move(1.0)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if report.step % self.every == 0:
            new = 1 - self.decay
            self.mass = self.decay * self.mass + new
            self._move(new / self.mass)

    def _move(self, share: float) -> None:
        self.parts.engine.average(share)
        self.parts.vocab_optimizer.optimizer.average(share)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the average in place of its weights. Collectives: the engine's, to set the body's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        self.parts.engine.swap_averages()
        self.parts.vocab_optimizer.optimizer.swap_averages()

    def state_dict(self) -> HookState:
        """The average by the names of the weights. Collectives: the engine's."""
        tensors = dict(self.parts.engine.averages())
        for name, weight_vD in self.parts.model.vocab.named_rows().items():
            tensors[name] = matrix_dtensor(self._of(weight_vD), self.parts.model.vocab.shard, self.parts.mesh)
        return {saved_name(name, AVERAGE): tensor for name, tensor in tensors.items()} | {MASS: self.mass}

    def load_state_dict(self, state: HookState) -> None:
        """Restores the average; that of the rows was filled in place."""
        body = {name.removeprefix(f"{AVERAGE}."): tensor for name, tensor in state.items()}
        self.parts.engine.load_averages({name: one for name, one in body.items() if isinstance(one, DTensor)})
        mass = state[MASS]
        assert isinstance(mass, float)
        self.mass, self._loaded = mass, True

    def _of(self, weight_vD: Tensor) -> Tensor:
        return self.parts.vocab_optimizer.optimizer.state_of(weight_vD)[AVERAGE]


def build(config: JobConfig, run: Run) -> EmaHook | None:
    """The hook, if ema.decay is set. Adds the average to what is evaluated."""
    if not config.ema.on:
        return None
    hook = EmaHook(config.ema, run.parts)
    run.variants["_ema"] = hook.swapped
    return hook

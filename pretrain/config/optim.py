"""Settings of the optimizer and its learning rate. Group optim."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .lengths import NOT_GIVEN, Batches, Number, Steps, steps_or_text

LONGEST_WARMUP = 2000  # steps, if optim.warmup_steps is not given; as OLMo 2 and SmolLM3
RULES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (  # keys, the rule, the rule in words
    (("lr", "eps"), lambda value: 0 < value < math.inf, "must be positive"),
    (("clip", "weight_decay"), lambda value: 0 <= value < math.inf, "must be a number of at least 0"),
    (("min_lr_ratio", "decay_fraction"), lambda value: 0 <= value <= 1, "must be in [0, 1]"),
    (("beta1", "beta2", "momentum"), lambda value: 0 <= value < 1, "must be in [0, 1)"),
)


class Hyperparameters(NamedTuple):
    """Hyperparameters of one owner of parameters: the body or the vocabulary."""

    lr_factor: float  # its learning rate / the common one, constant over the schedule
    decay_peak: float | None  # peak of the common learning rate, if weight decay follows it; None: constant
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass
class OwnerConfig:
    """Overrides for the body or for the vocabulary. null: the common setting."""

    lr: float | None = None  # peak learning rate of the same schedule
    beta1: float | None = None  # decay per step of the running mean of the gradients
    beta2: float | None = None  # decay per step of the running mean of their squares
    eps: float | None = None  # added to the denominator of the update
    weight_decay: float | None = None  # weight decay of matrices; biases and norms are never decayed
    weight_decay_schedule: str | None = None  # constant or lr


@dataclass
class OptimConfig:
    """The optimizer and its learning rate over the steps of the run."""

    can_offload: ClassVar[bool] = True  # engine.offload=cpu is possible

    name: str = "adamw"  # optimizer of the body: adamw or muon; the vocabulary always uses AdamW
    #: peak learning rate; null: from the parameters of the body and the tokens of the run, by Step Law
    #: (Li et al., arXiv:2503.04715), at most 2e-3
    lr: Number = NOT_GIVEN
    #: cosine: falls to min_lr_ratio·lr at the last step; wsd (warm-up, stable, decay; Hu et al., arXiv:2404.06395):
    #: constant, then falls linearly over the last decay_fraction of the steps
    schedule: str = "cosine"
    #: steps of linear warm-up, or its samples or tokens: 2B tokens; null: a tenth of train.steps, at most 2000
    warmup_steps: Steps | None = None
    min_lr_ratio: float = 0.1  # learning rate of the last step / lr
    decay_fraction: float = 0.2  # fraction of the steps, at the end, over which wsd decays; cosine ignores it
    decay_steps: Steps | None = None  # instead of decay_fraction: steps of this decay, or its samples or tokens
    clip: float = 1.0  # largest norm of the gradient of body and matrix together; 0: no clipping
    beta1: float = 0.9  # decay per step of the running mean of the gradients
    beta2: float = 0.95  # decay per step of the running mean of their squares
    eps: float = 1e-8  # added to the denominator of the update
    weight_decay: float = 0.1  # weight decay of matrices; biases and norms are never decayed
    #: constant, or lr: weight_decay · learning rate / its peak, so that the shrinking of a step goes with the rate's
    #: square, and the norms of weights and gradients stay steady while the rate falls (Defazio, arXiv:2506.02285)
    weight_decay_schedule: str = "constant"
    #: width for which the learning rates are given: rates, initial values, eps and weight decay follow model.width from
    #: there, by muP (Yang et al., arXiv:2203.03466); null: they are for this model as it is
    base_width: int | None = None
    body: OwnerConfig = field(default_factory=OwnerConfig)  # overrides for the body
    vocab: OwnerConfig = field(default_factory=OwnerConfig)  # overrides for the embedding and the head

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"optim.schedule={self.schedule} must be cosine or wsd")
        if self.warmup_steps is not None:
            self.warmup_steps = steps_or_text("optim.warmup_steps", self.warmup_steps, 0)
        if self.decay_steps is not None:
            self.decay_steps = steps_or_text("optim.decay_steps", self.decay_steps, 0)
        if self.base_width is not None and self.base_width < 1:
            raise ValueError(f"optim.base_width={self.base_width} must be at least 1 (or null: off)")
        _check("optim", self)
        _check("optim.body", self.body)
        _check("optim.vocab", self.vocab)
        for prefix, settings in (("optim", self), ("optim.body", self.body), ("optim.vocab", self.vocab)):
            if settings.weight_decay_schedule not in (None, "constant", "lr"):
                raise ValueError(
                    f"{prefix}.weight_decay_schedule={settings.weight_decay_schedule} must be constant or lr"
                )

    def hyperparameters(self, own: OwnerConfig) -> Hyperparameters:
        """Hyperparameters of an owner: from `own` (`body` or `vocab`) if set there, else the common ones."""

        def value(key: str) -> Any:
            given = getattr(own, key)
            return getattr(self, key) if given is None else given

        peak = self.lr if value("weight_decay_schedule") == "lr" else None
        return Hyperparameters(value("lr") / self.lr, peak, *map(value, Hyperparameters._fields[2:]))

    @property
    def matrix_itemsize(self) -> int | None:
        """Bytes of a number of a matrix that is stepped whole; None: of the compute dtype, or no matrix is."""
        return None

    def settle(self, batches: Batches, steps: int) -> None:
        """Converts the lengths of a schedule of `steps` steps to steps, and sets the warm-up if it is not given."""
        if self.decay_steps is not None:
            self.decay_steps = batches.steps("optim.decay_steps", self.decay_steps, until=steps)
        if self.warmup_steps is not None:
            self.warmup_steps = batches.steps("optim.warmup_steps", self.warmup_steps)
        self.warmup_steps = self.warmup(steps)

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up in a schedule of `steps` steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return max(0, min(LONGEST_WARMUP, steps // 10, steps - self.decay(steps)))

    def decay(self, steps: int) -> int:
        """Steps of the final decay of wsd; 0 for cosine, which has no separate decay."""
        if self.schedule != "wsd":
            return 0
        if self.decay_steps is not None:
            return self.decay_steps
        if self.decay_fraction == 0:
            return 0
        return max(1, round(self.decay_fraction * steps))

    def check_steps(self, steps: int) -> None:
        """Raises ValueError if warm-up and decay together take more than `steps` steps."""
        warmup, decay = self.warmup(steps), self.decay(steps)
        advice = "give fewer warm-up steps, or null: a tenth of the steps, at most 2000"
        if warmup >= steps:
            raise ValueError(f"optim.warmup_steps={warmup} must be below train.steps={steps}: {advice}")
        if warmup + decay > steps:
            by_fraction = f"the {decay} steps of optim.decay_fraction={self.decay_fraction}"
            raise ValueError(
                f"optim.warmup_steps={warmup} and"
                f" {by_fraction if self.decay_steps is None else f'optim.decay_steps={decay}'} must not overlap in"
                f" train.steps={steps}: {advice}"
            )


def _check(prefix: str, settings: Any) -> None:
    """Raises ValueError if a number is out of range. Missing keys and nulls are skipped."""
    for keys, allowed, rule in RULES:
        for key in keys:
            value = getattr(settings, key, None)
            if value is not None and not allowed(value):
                raise ValueError(f"{prefix}.{key}={value} {rule}")


@dataclass
class MuonConfig(OptimConfig):
    """Muon for the matrices of the blocks; AdamW for the body's other parameters and the vocabulary."""

    can_offload: ClassVar[bool] = False

    name: str = "muon"  # optimizer of the body: adamw or muon; the vocabulary always uses AdamW
    momentum: float = 0.95  # decay per step of the running mean of a matrix's gradients; beta1 and beta2 are AdamW's
    #: momentum of the first step; it rises linearly to `momentum` over momentum_warmup_steps (0.85 in modded-nanogpt
    #: and nanochat); null: no warm-up
    momentum_start: float | None = None
    momentum_warmup_steps: Steps = 300  # steps of the momentum's warm-up, or its samples or tokens
    #: dtype of Newton-Schulz: bf16, as torch.optim.Muon always does; fp32; auto: the dtype of the other matmuls, which
    #: train.precision sets
    newton_schulz: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newton_schulz not in ("auto", "bf16", "fp32"):
            raise ValueError(f"optim.newton_schulz={self.newton_schulz} must be auto, bf16 or fp32")
        self.momentum_warmup_steps = steps_or_text("optim.momentum_warmup_steps", self.momentum_warmup_steps, 1)
        if self.momentum_start is not None and not 0 <= self.momentum_start <= self.momentum:
            raise ValueError(
                f"optim.momentum_start={self.momentum_start} must be at least 0, and at most"
                f" optim.momentum={self.momentum}"
            )

    def settle(self, batches: Batches, steps: int) -> None:
        super().settle(batches, steps)
        self.momentum_warmup_steps = batches.steps("optim.momentum_warmup_steps", self.momentum_warmup_steps)

    @property
    def matrix_itemsize(self) -> int | None:
        return {"bf16": 2, "fp32": 4}.get(self.newton_schulz)


OPTIMIZERS: dict[str, type[OptimConfig]] = {"adamw": OptimConfig, "muon": MuonConfig}

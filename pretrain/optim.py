"""Parameter groups, the schedule, and the exact clip over both owners: the engine's body and the matrix."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .mesh import Mesh
from .vocab.collectives import on_host
from .vocab.gradients import sum_of_squares

LONGEST_WARMUP = 100  # steps, unless optim.warmup_steps is given


@dataclass
class OptimConfig:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) and its learning rate over the steps of the run.

    schedule: "cosine" falls to min_lr_ratio·lr at the last step; "wsd" (warm-up, stable, decay; Hu et al.,
    arXiv:2404.06395) holds lr and falls linearly over the last decay_fraction of the steps. warmup_steps: the first
    steps, in which lr rises linearly; null: a tenth of the steps, at most 100. clip: the largest norm of the whole
    gradient, 0 for none. Weight decay reaches tensors of two dims only.
    """

    lr: float = 6e-4
    schedule: str = "cosine"
    warmup_steps: int | None = None
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise ValueError(f"optim.schedule={self.schedule} must be cosine or wsd")
        for key in ("lr", "eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be positive")
        for key in ("warmup_steps", "clip", "weight_decay"):
            if getattr(self, key) is not None and not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be a number of at least 0")
        for key in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be in [0, 1]")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} must be in [0, 1)")

    def adamw(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """One fused AdamW with a decaying and an undecayed group (biases and norms); lr is set at each step."""
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of the step, counted from 0, in a schedule of that many steps."""
        warmup = self.warmup(steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        floor = self.lr * self.min_lr_ratio
        if self.schedule == "cosine":
            done = (step - warmup) / max(1, steps - 1 - warmup)
            return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        decay = self.decay(steps)
        if decay == 0:
            return self.lr
        left = (steps - 1 - step) / decay
        return floor + (self.lr - floor) * min(1.0, max(0.0, left))

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up in a schedule of that many."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return max(0, min(LONGEST_WARMUP, steps // 10, steps - self.decay(steps)))

    def decay(self, steps: int) -> int:
        """Steps of the final decay of a "wsd" schedule; 0 for "cosine", which has no separate decay."""
        if self.schedule != "wsd" or self.decay_fraction == 0:
            return 0
        return max(1, round(self.decay_fraction * steps))

    def check_steps(self, steps: int) -> None:
        """Raises ValueError if the warm-up, or warm-up and decay together, do not fit into that many steps."""
        warmup, decay = self.warmup(steps), self.decay(steps)
        advice = "give fewer warm-up steps, or null: a tenth of the steps, at most 100"
        if warmup >= steps:
            raise ValueError(f"optim.warmup_steps={warmup} must be below train.steps={steps}: {advice}")
        if warmup + decay > steps:
            raise ValueError(
                f"optim.warmup_steps={warmup} and the {decay} steps of optim.decay_fraction={self.decay_fraction} must"
                f" not overlap in train.steps={steps}: {advice}"
            )


class VocabOptimizer:
    """AdamW on this rank's rows. The rows are replicated over `dp`, and stay equal: same gradient, same step."""

    def __init__(self, rows: Iterable[nn.Parameter], config: OptimConfig, mesh: Mesh) -> None:
        self.rows = list(rows)
        self.mesh = mesh
        self.observers: list[Callable[[], None]] = []  # of the summed gradients, before they are clipped
        self.adamw = config.adamw(self.rows)
        set_moments(self.adamw, step=0)

    def add_copy(self, rows: nn.Parameter, of: nn.Parameter) -> None:
        """Takes on `rows`, a copy of `of`: with its settings, and copies of its moments. Local."""
        self.rows.append(rows)
        (group,) = self.adamw.param_groups
        group["params"].append(rows)
        self.adamw.state[rows] = {name: value.clone() for name, value in self.adamw.state[of].items()}

    def reduce_gradients(self) -> None:
        """Sums the gradients of the replicas, one all-reduce per matrix; and what observers do."""
        self.mesh.sum_replicas(row.grad for row in self.rows if row.grad is not None)
        for observe in self.observers:
            observe()

    def grad_norm(self) -> Tensor:
        """Norm of the whole matrix's gradient, float64 scalar. One all-reduce of a number over all ranks.

        Over all, though one vocab group would do: each group's sum could differ in the last bit, and replicas that
        clip differently drift apart.
        """
        counts = self.mesh.first_replica
        return global_norm([row.grad for row in self.rows if row.grad is not None] if counts else [], self.mesh)

    def step(self, lr: float, clip: float) -> None:
        apply_clip([row.grad for row in self.rows if row.grad is not None], clip)
        step_at(self.adamw, lr)


def clip_factor(body_norm: Tensor, matrix_norm: Tensor, clip: float) -> tuple[float, float]:
    """Norm of the whole gradient, and what to multiply it with so that it does not exceed `clip` (0: 1.0).

    `torch.nn.utils.clip_grad_norm_` cannot do this: it refuses DTensors of different meshes.
    """
    norm = math.hypot(float(on_host(body_norm)), float(on_host(matrix_norm)))
    return norm, min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0


def global_norm(mine: list[Tensor], mesh: Mesh) -> Tensor:
    """Norm over the tensors of all ranks, float64 scalar, the same bits on every rank. One all-reduce of a number."""
    square = sum_of_squares(mine, mesh.device)
    dist.all_reduce(square, group=mesh.flat.get_group())
    return square.sqrt()


def apply_clip(gradients: list[Tensor], factor: float) -> None:
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def set_moments(adamw: torch.optim.AdamW, step: int, parameters: Iterable[Tensor] | None = None) -> None:
    """Gives every parameter its moments (zeros, where it has none yet) and the count of steps behind them.

    Ahead of the first step, so that a checkpoint of step 0 is like any other. `parameters`: those of the optimizer's
    groups, unless given.
    """
    if parameters is None:
        parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
    for parameter in parameters:
        state = adamw.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)


def step_at(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step at this learning rate; the gradients are gone afterwards."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

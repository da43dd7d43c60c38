"""Parameter groups, the schedule, and the exact clip over both owners: the engine's body and the matrix."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config.optim import OptimConfig
from .mesh import Mesh
from .vocab.collectives import on_host
from .vocab.gradients import sum_of_squares


def build_adamw(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """One fused AdamW with a decaying and an undecayed group (biases and norms); lr is set at each step."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


class VocabOptimizer:
    """AdamW on this rank's rows. The rows are replicated over `dp`, and stay equal: same gradient, same step."""

    def __init__(self, rows: Iterable[nn.Parameter], config: OptimConfig, mesh: Mesh) -> None:
        self.rows = list(rows)
        self.mesh = mesh
        self.observers: list[Callable[[], None]] = []  # of the summed gradients, before they are clipped
        self.adamw = build_adamw(config, self.rows)
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

"""AdamW. Separate from base.py, which names no algorithm."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..config.optim import Hyperparameters, OptimConfig, OwnerConfig
from .base import Optimizer, local
from .width import NONE, SAME, Factors


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), as torch's fused kernel.

    Weight decay applies to parameters of two or more dims, not to biases and norms. The update is elementwise, so the
    optimizer can also step flat parts of parameters.
    """

    @classmethod
    def build(
        cls,
        parameters: Iterable[nn.Parameter],
        optim: OptimConfig,
        own: OwnerConfig,
        hidden: Iterable[nn.Parameter] = (),
        factors: Mapping[nn.Parameter, Factors] = NONE,
    ) -> Self:
        chosen = optim.hyperparameters(own)
        groups = groups_of(parameters, chosen, factors)
        return cls(torch.optim.AdamW(groups, fused=True), chosen.lr_factor, chosen.decay_peak)

    @torch.no_grad()
    def update(self) -> None:
        """Steps the local parts of DTensors: the update is elementwise, and torch's step of DTensors takes the host
        three times as long.
        """
        for group in self.stepper.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            self.load(0, [parameter for parameter in used if not self.stepper.state[parameter]])  # of new parameters
            step_group(group, self.stepper.state)

    @staticmethod
    def state_names(shape: torch.Size, hidden: bool = False) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"


def groups_of(
    parameters: Iterable[nn.Parameter], chosen: Hyperparameters, factors: Mapping[nn.Parameter, Factors]
) -> list[dict[str, Any]]:
    """Groups with and without weight decay, and of parameters with the same factors; an empty one is left out."""
    groups: dict[tuple[bool, Factors], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dim() < 2, factors.get(parameter, SAME)), []).append(parameter)
    return [
        {
            "params": groups[vectors, own],
            "weight_decay": 0.0 if vectors else chosen.weight_decay * own.weight_decay,
            "betas": (chosen.beta1, chosen.beta2),
            "eps": chosen.eps * own.eps,
            "width_factor": own.lr,
        }
        for vectors, own in sorted(groups)
    ]


def step_group(group: dict[str, Any], states: Mapping[Tensor, dict[str, Tensor]]) -> None:
    """Steps the parameters of a group that have gradients: the local parts of DTensors."""
    used = [parameter for parameter in group["params"] if parameter.grad is not None]
    found = [states[parameter] for parameter in used]
    adamw(
        [local(parameter) for parameter in used],
        [local(parameter.grad) for parameter in used],
        [local(state["exp_avg"]) for state in found],
        [local(state["exp_avg_sq"]) for state in found],
        [],
        [state["step"] for state in found],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )

"""AdamW. Separate from base.py, which names no algorithm."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..config.optim import OptimConfig, OwnerConfig
from .base import Optimizer, local


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), as torch's fused kernel.

    Weight decay applies to parameters of two or more dims, not to biases and norms. The update is elementwise, so the
    optimizer can also step flat parts of parameters.
    """

    @classmethod
    def build(cls, parameters: Iterable[nn.Parameter], optim: OptimConfig, own: OwnerConfig) -> Self:
        parameters, chosen = list(parameters), optim.hyperparameters(own)
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": chosen.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        stepper = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(chosen.beta1, chosen.beta2),
            eps=chosen.eps,
            fused=True,
        )
        return cls(stepper, chosen.lr_factor)

    @torch.no_grad()
    def update(self) -> None:
        """Steps the local parts of DTensors: the update is elementwise, and torch's step of DTensors takes the host
        three times as long.
        """
        for group in self.stepper.param_groups:
            used = [parameter for parameter in group["params"] if parameter.grad is not None]
            self.load(0, [parameter for parameter in used if not self.stepper.state[parameter]])  # of new parameters
            states = [self.stepper.state[parameter] for parameter in used]
            adamw(
                [local(parameter) for parameter in used],
                [local(parameter.grad) for parameter in used],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    @staticmethod
    def state_names(shape: torch.Size) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

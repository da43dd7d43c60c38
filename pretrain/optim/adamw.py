"""AdamW. Separate from base.py, which names no algorithm."""

from collections.abc import Iterable
from typing import Self

import torch
from torch import nn

from ..config.optim import OptimConfig, OwnerConfig
from .base import Optimizer


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

    @staticmethod
    def state_names(shape: torch.Size) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

"""Interface of an optimizer to engines, the vocabulary, checkpoints and the planner. Apart from adamw.py, its one
implementation, which only build.py names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from ..config.optim import OptimConfig, OwnerConfig

STATE_PREFIX = "optim."  # of the names of all states in a checkpoint, such as optim.exp_avg.blocks.0.mlp.up.weight
NUMBER = 4  # bytes: states are fp32


class Optimizer(ABC):
    """Steps parameters, and keeps a state for each: tensors of its shape by name, and the count of steps behind them.

    `stepper` is the torch optimizer that does it, with its parameters in groups. An engine may put others into the
    groups (ZeRO: parts of all parameters, end to end). Who builds it calls `load(0)` once the groups are as they stay:
    then a checkpoint of step 0 is like any other.
    """

    def __init__(self, stepper: torch.optim.Optimizer, lr_factor: float) -> None:
        self.stepper, self.lr_factor = stepper, lr_factor

    @classmethod
    @abstractmethod
    def build(cls, parameters: Iterable[nn.Parameter], optim: OptimConfig, own: OwnerConfig) -> Self:
        """own: optim.body or optim.vocab."""

    @staticmethod
    @abstractmethod
    def state_names(shape: torch.Size) -> tuple[str, ...]:
        """Names of the tensors in the state of a parameter of this shape, in the order of a checkpoint."""

    @classmethod
    def bytes_per_parameter(cls, shape: torch.Size) -> int:
        """Bytes of state per number of a parameter of this shape."""
        return NUMBER * len(cls.state_names(shape))

    @property
    def parameters(self) -> list[Tensor]:
        """Parameters that are stepped, in the order of the groups."""
        return [parameter for group in self.stepper.param_groups for parameter in group["params"]]

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The live tensors. One more, `step`, is torch's count of steps."""
        return self.stepper.state[parameter]

    def tensors(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The live parameter and the tensors of its state, by their names in a checkpoint."""
        state = self.state_of(parameter)
        named = {saved_name(name, kind): state[kind] for kind in self.state_names(parameter.shape)}
        return {name: parameter.detach()} | named

    def load(self, step: int, parameters: Iterable[Tensor] | None = None) -> None:
        """Sets the count of steps behind each state, and gives zeros to a parameter that has none yet.

        The states themselves are filled in place. parameters: those of the groups, unless given.
        """
        for parameter in self.parameters if parameters is None else parameters:
            state = self.stepper.state[parameter]
            for name in self.state_names(parameter.shape):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)

    def copy_state(self, new: nn.Parameter, source: Tensor) -> None:
        """Takes on `new`, a copy of the parameter `source`: in its group, and with a copy of its state. Local."""
        (group,) = (g for g in self.stepper.param_groups if any(parameter is source for parameter in g["params"]))
        group["params"].append(new)
        self.stepper.state[new] = {name: tensor.clone() for name, tensor in self.state_of(source).items()}

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next step from the common one."""
        for group in self.stepper.param_groups:
            group["lr"] = lr * self.lr_factor

    def step(self, lr: float) -> None:
        """Takes one step at this common learning rate, and frees the gradients."""
        self.set_lr(lr)
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)


def saved_name(parameter: str, kind: str) -> str:
    """Name in a checkpoint of a tensor of the parameter's state, or of the parameter itself if `kind` is empty."""
    return f"{STATE_PREFIX}{kind}.{parameter}" if kind else parameter

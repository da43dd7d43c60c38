"""Interface of an optimizer for engines, the vocabulary, checkpoints and the planner.

Separate from the implementation in adamw.py, which only build.py names.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.ema import AVERAGE
from ..config.optim import OptimConfig, OwnerConfig
from .owners import Cut
from .width import NONE, Factors

STATE_PREFIX = "optim."  # of state names in a checkpoint, such as optim.exp_avg.blocks.0.mlp.up.weight
NUMBER = 4  # bytes per number: states are fp32
PIECE_BYTES = 64 << 20  # of a parameter, copied at a time


@dataclass(frozen=True)
class Piece:
    """Part of a hidden parameter, a 2-d weight of a block, that a rank steps."""

    shape: torch.Size  # of the whole parameter
    stacked: tuple[int, ...]  # rows of the matrices that are stacked in it, such as queries, keys and values
    cut: Cut  # of the flattened parameter over the ranks
    tensor: Tensor  # stepped by this rank, with the part in it: a DTensor, or a flat tensor of many parameters
    offset: int  # of the part in the flattened local tensor


class Optimizer(ABC):
    """Steps parameters and keeps a state per parameter: tensors of the parameter's shape by name, and a step count.

    `stepper` is the torch optimizer, with its parameters in groups. An engine may replace the parameters in the groups
    (ZeRO: flat parts of all parameters). After that the engine must call `place`, and `load(0)`, which creates the
    states: a checkpoint of step 0 then has the same tensors as any other.

    averaged: also keep a running average of each parameter, as the state tensor AVERAGE. Set it before the first
    `load`. A step leaves the average unchanged: `average` moves it.
    """

    whole_matrices: ClassVar[bool] = False  # a step moves hidden matrices between the ranks: `owners.Schedule`

    def __init__(self, stepper: torch.optim.Optimizer, lr_factor: float, decay_peak: float | None = None) -> None:
        """lr_factor, decay_peak: of the owner's `Hyperparameters`."""
        self.stepper, self.decay_peak, self.averaged = stepper, decay_peak, False
        self.weight_decays = [group["weight_decay"] for group in stepper.param_groups]  # at the peak
        self.lr_factors = [lr_factor * group.get("width_factor", 1.0) for group in stepper.param_groups]

    @classmethod
    @abstractmethod
    def build(
        cls,
        parameters: Iterable[nn.Parameter],
        optim: OptimConfig,
        own: OwnerConfig,
        hidden: Iterable[nn.Parameter] = (),
        factors: Mapping[nn.Parameter, Factors] = NONE,
    ) -> Self:
        """Builds the optimizer of these parameters. own: optim.body or optim.vocab. hidden: 2-d weights of blocks.
        factors: on the settings of single parameters.
        """

    @staticmethod
    @abstractmethod
    def state_names(shape: torch.Size, hidden: bool = False) -> tuple[str, ...]:
        """Names of the state tensors of a parameter of this shape, in checkpoint order. hidden: see `build`."""

    @staticmethod
    def group_of(shape: torch.Size, hidden: bool) -> int:
        """Index of the group of a parameter of this shape. Empty groups count as well."""
        return int(len(shape) < 2)

    @classmethod
    def bytes_per_parameter(cls, shape: torch.Size, hidden: bool = False) -> int:
        """Bytes of state per number of a parameter of this shape. hidden: see `build`."""
        return NUMBER * len(cls.state_names(shape, hidden))

    def place(self, units: list[list[Piece]], group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:  # noqa: B027
        """Tells where the hidden parameters are; an optimizer that steps elementwise does not need it.

        units: the engine steps the pieces of each unit at once. group: the ranks over which they are cut; None: this
        rank is alone. dtype: of the engine's matmuls.
        """

    @property
    def parameters(self) -> list[Tensor]:
        """Parameters that are stepped, in the order of the groups."""
        return [parameter for group in self.stepper.param_groups for parameter in group["params"]]

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """State tensors of the parameter, not copies. The entry `step` is torch's step count."""
        return self.stepper.state[parameter]

    def names_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of the state tensors of a stepped parameter."""
        return self.state_names(parameter.shape)

    def tensors(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter and its state tensors (not copies), by their names in a checkpoint."""
        state = self.state_of(parameter)
        named = {saved_name(name, kind): state[kind] for kind in self.names_of(parameter)}
        return {name: parameter.detach()} | named

    def load(self, step: int, parameters: Iterable[Tensor] | None = None) -> None:
        """Sets the step count of each state, and creates missing states as zeros.

        The caller fills the states in place. parameters: default all parameters of the groups.
        """
        for parameter in self.parameters if parameters is None else parameters:
            state = self.stepper.state[parameter]
            for name in (*self.names_of(parameter), *[AVERAGE] * self.averaged):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)

    def copy_state(self, new: nn.Parameter, source: Tensor) -> None:
        """Adds `new`, a copy of the parameter `source`, to the same group, with a copy of its state. No collective."""
        (group,) = (g for g in self.stepper.param_groups if any(parameter is source for parameter in g["params"]))
        group["params"].append(new)
        self.stepper.state[new] = {name: tensor.clone() for name, tensor in self.state_of(source).items()}

    @torch.no_grad()
    def average(self, share: float, parameters: Iterable[Tensor] | None = None) -> None:
        """Moves the running averages by `share` of the distance to the parameters; 1: a copy. parameters: as in `load`.

        No collective: works on this rank's parts.
        """
        averages, weights = self._averages(parameters)
        torch._foreach_lerp_(averages, weights, share)

    @torch.no_grad()
    def swap_averages(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Exchanges parameters and running averages in place, on this rank's parts. Twice: nothing has changed."""
        for average, weight in zip(*self._averages(parameters), strict=True):
            rows = max(1, PIECE_BYTES // max(1, weight[:1].nbytes))
            for one, other in zip(average.split(rows), weight.split(rows), strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    def _averages(self, parameters: Iterable[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        """Returns this rank's parts of the averages and of the parameters, without empty ones."""
        chosen = self.parameters if parameters is None else list(parameters)
        chosen = [parameter for parameter in chosen if local(parameter).numel()]
        return [local(self.state_of(one)[AVERAGE]) for one in chosen], [local(one.detach()) for one in chosen]

    def set_lr(self, lr: float, momentum: float | None = None) -> None:
        """Sets the learning rates of the groups, the common rate times this owner's factor, and the weight decay if it
        follows the rate. momentum: for groups that have one; None: unchanged.
        """
        groups = zip(self.stepper.param_groups, self.lr_factors, self.weight_decays, strict=True)
        for group, lr_factor, weight_decay in groups:
            group["lr"] = lr * lr_factor
            if self.decay_peak is not None:
                group["weight_decay"] = weight_decay * (lr / self.decay_peak)
            if momentum is not None and "momentum" in group:
                group["momentum"] = momentum

    def step(self, lr: float, momentum: float | None = None) -> None:
        """Takes one step with the values of `set_lr`. Frees the gradients."""
        self.set_lr(lr, momentum)
        self.update()
        self.discard()

    def discard(self) -> None:
        """Frees the gradients."""
        self.stepper.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Updates the parameters that have gradients, at the groups' learning rates."""
        self.stepper.step()


def saved_name(parameter: str, kind: str) -> str:
    """Name of a state tensor in a checkpoint, or of the parameter itself if `kind` is empty."""
    if kind == AVERAGE:
        return f"{AVERAGE}.{parameter}"
    return f"{STATE_PREFIX}{kind}.{parameter}" if kind else parameter


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a DTensor on this rank; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""Memory and traffic of an engine for the body, in bytes per rank and step: the protocol and shared parts.

Separate from base.py because a footprint only computes with shapes. Each engine's footprint is in a file beside the
engine. In formulas, i is the number of bytes of the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..optim import Optimizer
from ..placement import Transfer

FP32 = 4  # bytes: main weights, gradients and sums
COUNT, NORM = 40, 8  # bytes per step over all ranks: the count of targets and the reasons to stop; a norm


@dataclass(frozen=True)
class Shapes:
    """Shapes of the body's parameters, per block and outside blocks."""

    blocks: list[list[torch.Size]]
    rest: list[torch.Size]
    optimizer: type[Optimizer]  # class of the optimizer that steps them

    @classmethod
    def of(cls, body: nn.Module, optimizer: type[Optimizer]) -> "Shapes":
        blocks: list[nn.Module] = list(body.blocks)  # type: ignore[arg-type]
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        rest = [parameter.shape for parameter in body.parameters() if id(parameter) not in inside]
        return cls([[parameter.shape for parameter in block.parameters()] for block in blocks], rest, optimizer)

    @property
    def all(self) -> list[torch.Size]:
        return [shape for part in (*self.blocks, self.rest) for shape in part]

    @property
    def matmuls(self) -> int:
        """Number of weights in matmuls."""
        return sum(shape.numel() for block in self.blocks for shape in block if len(shape) == 2)

    @property
    def state(self) -> float:
        """Bytes of optimizer state per number, averaged over the parameters."""
        states = sum(shape.numel() * self.optimizer.bytes_per_parameter(shape) for shape in self.all)
        return states / numbers(self.all)


def numbers(part: Sequence[torch.Size]) -> int:
    """Counts the numbers in parameters of these shapes."""
    return sum(shape.numel() for shape in part)


class BodyFootprint(Protocol):
    """Memory and traffic of one engine. `behind`: number of blocks with a finished backward."""

    shapes: Shapes
    formulas: tuple[str, str, str, str]  # of weights, optimizer states, gradients, gathered
    stepped: int  # numbers stepped by this rank's optimizer

    @property
    def weights(self) -> int: ...

    @property
    def states(self) -> int: ...

    def gradients(self, behind: int) -> int: ...

    def gathered(self, behind: int, in_block: bool) -> int:
        """Bytes held temporarily within a step: weights gathered from other ranks, and gradients being reduced."""
        ...

    def transfers(self) -> list[Transfer]: ...


def agreements(world: int) -> Transfer:
    """Transfer that every engine has: the count of targets, the reasons to stop, and the norms of body and matrix."""
    return Transfer("count and norms", "all-reduce", "world", world, 3, COUNT + 2 * NORM, "40 + 2 · 8")

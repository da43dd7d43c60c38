"""Memory and traffic of an engine for the body in one step of one rank, in bytes: the protocol, and what all share.

Not part of base.py, which is what runs: a footprint is arithmetic on shapes. Each engine's own is beside the engine.
In formulas, i is the bytes of a number of the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..optim import Optimizer
from ..placement import Transfer

FP32 = 4  # bytes: main weights, gradients and sums
COUNT, NORM = 8, 8  # bytes: what all ranks agree on in a step


@dataclass(frozen=True)
class Shapes:
    """The shapes of the body's parameters: those of each block, and the rest."""

    blocks: list[list[torch.Size]]
    rest: list[torch.Size]
    optimizer: type[Optimizer]  # what steps them

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
        """Numbers that every token is multiplied with."""
        return sum(shape.numel() for block in self.blocks for shape in block if len(shape) == 2)

    @property
    def state(self) -> float:
        """Bytes of optimizer state per number, on average over the parameters."""
        states = sum(shape.numel() * self.optimizer.bytes_per_parameter(shape) for shape in self.all)
        return states / numbers(self.all)


def numbers(part: Sequence[torch.Size]) -> int:
    """Counts the numbers in parameters of these shapes."""
    return sum(shape.numel() for shape in part)


class BodyFootprint(Protocol):
    """Memory and traffic of one engine. `behind`: how many blocks have been through the backward."""

    shapes: Shapes
    formulas: tuple[str, str, str, str]  # of weights, optimizer states, gradients, gathered
    stepped: int  # numbers that this rank's optimizer steps

    @property
    def weights(self) -> int: ...

    @property
    def states(self) -> int: ...

    def gradients(self, behind: int) -> int: ...

    def gathered(self, behind: int, in_block: bool) -> int:
        """Bytes that come and go within a step: others' weights, and gradients on their way."""
        ...

    def transfers(self) -> list[Transfer]: ...


def agreements(world: int) -> Transfer:
    """Transfer for what all ranks agree on, in every engine: the count of targets, the norms of body and matrix."""
    return Transfer("count and norms", "all-reduce", "world", world, 3, COUNT + 2 * NORM, "8 + 2 · 8")

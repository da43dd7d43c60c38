"""Memory and traffic of an engine for the body, in bytes per rank and step: the protocol and shared parts.

Separate from base.py because a footprint only computes with shapes. Each engine's footprint is in a file beside the
engine. In formulas, i is the number of bytes of the compute dtype.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..optim import Optimizer
from ..optim.owners import Cut, Schedule, matrices_of
from ..placement import Transfer

FP32 = 4  # bytes: main weights, gradients and sums
COUNT, NUMBER = 40, 8  # bytes per step over all ranks: the count of targets and the reasons to stop; a norm or loss


def hidden_matrices(body: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the rows of the matrices stacked in each 2-d weight of the blocks, by the weight's full name.

    A body states in `stacked` which weights are several matrices, by the ends of their names.
    """
    blocks: list[nn.Module] = list(body.blocks)  # type: ignore[arg-type]
    inside = {id(parameter) for block in blocks for parameter in block.parameters() if parameter.dim() == 2}
    stacked: dict[str, tuple[int, ...]] = getattr(body, "stacked", {})
    return {
        name: next((rows for end, rows in stacked.items() if name.endswith(f".{end}")), (len(parameter),))
        for name, parameter in body.named_parameters()
        if id(parameter) in inside
    }


@dataclass(frozen=True)
class Shapes:
    """Shapes of the body's parameters, per block and outside blocks."""

    blocks: list[list[torch.Size]]
    rest: list[torch.Size]
    optimizer: type[Optimizer]  # class of the optimizer that steps them
    stacked: list[tuple[int, ...]]  # rows of the matrices in each 2-d weight of the blocks
    itemsize: int | None  # bytes of a number of a matrix that the optimizer steps whole; None: of the compute dtype

    @classmethod
    def of(cls, body: nn.Module, optimizer: type[Optimizer], itemsize: int | None = None) -> "Shapes":
        blocks: list[nn.Module] = list(body.blocks)  # type: ignore[arg-type]
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        rest = [parameter.shape for parameter in body.parameters() if id(parameter) not in inside]
        shapes = [[parameter.shape for parameter in block.parameters()] for block in blocks]
        return cls(shapes, rest, optimizer, list(hidden_matrices(body).values()), itemsize)

    @property
    def all(self) -> list[torch.Size]:
        return [shape for part in (*self.blocks, self.rest) for shape in part]

    @property
    def hidden(self) -> list[torch.Size]:
        """The 2-d weights of the blocks."""
        return [shape for block in self.blocks for shape in block if len(shape) == 2]

    @property
    def matmuls(self) -> int:
        """Number of weights in matmuls."""
        return numbers(self.hidden)

    @property
    def groups(self) -> list[int]:
        """Numbers in each group of the optimizer."""
        groups: Counter[int] = Counter()
        for part in (*self.blocks, self.rest):
            for shape in part:
                hidden = part is not self.rest and len(shape) == 2
                groups[self.optimizer.group_of(shape, hidden)] += shape.numel()
        return [groups[index] for index in sorted(groups)]

    @property
    def state(self) -> float:
        """Bytes of optimizer state per number, averaged over the parameters."""
        states = sum(shape.numel() * self.optimizer.bytes_per_parameter(shape, hidden=True) for shape in self.hidden)
        others = [shape for part in self.blocks for shape in part if len(shape) != 2] + self.rest
        states += sum(shape.numel() * self.optimizer.bytes_per_parameter(shape) for shape in others)
        return states / numbers(self.all)

    def schedule(self, ranks: int, cuts: list[Cut]) -> Schedule | None:
        """Owners of the hidden matrices, cut over `ranks`; None if the optimizer steps elementwise."""
        if not self.optimizer.whole_matrices:
            return None
        return Schedule(matrices_of(zip(self.hidden, self.stacked, cuts, strict=True)), ranks)


def numbers(part: Sequence[torch.Size]) -> int:
    """Counts the numbers in parameters of these shapes."""
    return sum(shape.numel() for shape in part)


class BodyFootprint(Protocol):
    """Memory and traffic of one engine. `behind`: number of blocks with a finished backward."""

    shapes: Shapes
    formulas: tuple[str, str, str, str]  # of weights, optimizer states, gradients, gathered
    stepped: int  # numbers stepped by this rank's optimizer
    held: int  # of them, numbers in the memory of its device
    schedule: Schedule | None  # of the optimizer's work on whole matrices; None: it has none

    @property
    def weights(self) -> int: ...

    @property
    def states(self) -> int: ...

    def gradients(self, behind: int) -> int: ...

    def gathered(self, behind: int, in_block: bool) -> int:
        """Bytes held temporarily within a step: weights gathered from other ranks, and gradients being reduced."""
        ...

    def transfers(self) -> list[Transfer]:
        """Transfers of forward, backward and norms."""
        ...

    def exchanges(self) -> list[Transfer]:
        """Transfers of the optimizer's step."""
        ...


def exchanges(schedule: Schedule | None, itemsize: int, axis: str) -> list[Transfer]:
    """Transfers of rank 0 for whole matrices, with numbers of `itemsize` bytes."""
    if schedule is None or schedule.ranks == 1:
        return []
    to, back, rounds = *schedule.sent(0), len(schedule.rounds)
    return [
        Transfer(purpose, "all-to-all", axis, schedule.ranks, rounds, sent * itemsize, formula)
        for purpose, sent, formula in (
            ("updates to owners", to, "blocks / ranks · i"),
            ("orthogonal updates", back, "blocks · i" if schedule.replicated else "blocks / ranks · i"),
        )
        if sent
    ]


def agreements(world: int) -> Transfer:
    """Transfer that every engine has: the count of targets, the reasons to stop, two norms and the loss."""
    return Transfer("count, norms and loss", "all-reduce", "world", world, 3, COUNT + 3 * NUMBER, "40 + 3 · 8")

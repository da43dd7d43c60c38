"""What a measure of the matrix is told of a step, and how it goes over the rows."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

BLOCK = 2**20  # numbers of a matrix that are worked on at once


class MicroBatch(Protocol):
    """Ids of this rank; a target below 0 is ignored."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...


class StepReport(Protocol):
    """What a hook is told of a step, and adds to: see the trainer's."""

    @property
    def step(self) -> int: ...
    @property
    def scalars(self) -> dict[str, float]: ...
    @property
    def rows(self) -> dict[str, list[int]]: ...
    @property
    def micro_batches(self) -> Sequence[MicroBatch]: ...


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Of rows, so that what is made of them needs little room."""
    height = max(1, BLOCK // width)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))

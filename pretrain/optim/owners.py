"""Chooses the rank that orthogonalises each matrix, and counts what the ranks exchange for it.

Separate from muon.py because the planner computes with it as well. Pure arithmetic: no tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace

STEPS = 5  # of Newton-Schulz, as in torch.optim.Muon
ROUND = 32 * 2**20  # numbers that a rank gathers at a time


@dataclass(frozen=True)
class Cut:
    """How the ranks of a group hold a flattened parameter.

    Rank r holds the numbers [r · size - before, (r + 1) · size - before); if `replicated`, each rank holds all.
    """

    size: int
    before: int = 0
    replicated: bool = False

    def span(self, rank: int, numbers: int) -> tuple[int, int]:
        """First number and end of the part of a rank, of a parameter with this many numbers."""
        if self.replicated:
            return 0, numbers
        start = rank * self.size - self.before
        return min(max(start, 0), numbers), min(max(start + self.size, 0), numbers)


@dataclass(frozen=True)
class Matrix:
    """A matrix of a parameter; a parameter can stack several by rows."""

    parameter: int  # index among the parameters
    start: int  # its first number in the flattened parameter
    rows: int
    columns: int
    cut: Cut  # of the parameter
    whole: int  # numbers of the parameter

    @property
    def numbers(self) -> int:
        return self.rows * self.columns

    def span(self, rank: int) -> tuple[int, int]:
        """First number and end of the part of a rank, counted from the start of the matrix."""
        start, stop = self.cut.span(rank, self.whole)
        return tuple(min(max(at - self.start, 0), self.numbers) for at in (start, stop))  # type: ignore[return-value]

    def held(self, rank: int) -> int:
        """Numbers that a rank holds."""
        start, stop = self.span(rank)
        return stop - start

    @property
    def flops(self) -> int:
        """FLOPs of Newton-Schulz: per step X·Xᵀ, its square, and its product with X, on the shorter side."""
        short, long = sorted((self.rows, self.columns))
        return STEPS * (4 * short * short * long + 2 * short**3)


def matrices_of(parameters: Iterable[tuple[tuple[int, ...], tuple[int, ...], Cut]]) -> list[Matrix]:
    """Lists the matrices of parameters, given by shape, rows of the stacked matrices, and cut."""
    found = []
    for index, ((height, columns), stacked, cut) in enumerate(parameters):
        assert sum(stacked) == height, f"{stacked} rows of a parameter with {height}"
        start = 0
        for rows in stacked:
            found.append(Matrix(index, start, rows, columns, cut, height * columns))
            start += rows * columns
    return found


@dataclass(frozen=True)
class Schedule:
    """One owner for each matrix, so that all ranks have about the same FLOPs, in rounds of about ROUND numbers.

    Owners: longest processing time first (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
    """

    matrices: list[Matrix]
    ranks: int

    @cached_property
    def owned(self) -> list[list[int]]:
        """Indices of the matrices of each rank, the costliest first."""
        owned: list[list[int]] = [[] for _ in range(self.ranks)]
        loads = [(0, rank) for rank in range(self.ranks)]  # a heap
        for index in sorted(range(len(self.matrices)), key=lambda index: -self.matrices[index].flops):
            load, owner = loads[0]
            heapreplace(loads, (load + self.matrices[index].flops, owner))
            owned[owner].append(index)
        return owned

    @property
    def flops(self) -> int:
        """FLOPs of the rank with the most."""
        return max(sum(self.matrices[index].flops for index in mine) for mine in self.owned)

    @cached_property
    def rounds(self) -> list[list[list[int]]]:
        """Matrices of each rank, by round. Within a round all ranks have about the same FLOPs."""
        most = max(sum(self.matrices[index].numbers for index in mine) for mine in self.owned)
        number = min(max(map(len, self.owned)), -(-most // ROUND))
        rounds: list[list[list[int]]] = [[[] for _ in range(self.ranks)] for _ in range(number)]
        for rank, mine in enumerate(self.owned):
            done, load = 0, sum(self.matrices[index].flops for index in mine)
            for index in mine:
                rounds[number * done // load][rank].append(index)
                done += self.matrices[index].flops
        return rounds

    @property
    def replicated(self) -> bool:
        """True if each rank holds all numbers."""
        return all(matrix.cut.replicated for matrix in self.matrices)

    def sent(self, rank: int) -> tuple[int, int]:
        """Numbers that a rank sends to others in a step: to the owners, and back from its own matrices."""
        owner = {index: owner for owner, mine in enumerate(self.owned) for index in mine}
        to_owners = sum(matrix.held(rank) for index, matrix in enumerate(self.matrices) if owner[index] != rank)
        copies = self.ranks if self.replicated else 1
        back = sum(
            copies * self.matrices[index].numbers - self.matrices[index].held(rank) for index in self.owned[rank]
        )
        return 0 if self.replicated else to_owners, back

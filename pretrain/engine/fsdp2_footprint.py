"""Memory and traffic of FSDP2 per step. Separate from fsdp2.py because plans use it without an engine."""

import torch

from ..config.engine import FSDP2Config
from ..optim.owners import Cut
from ..placement import Transfer, Workload
from ..vocab.shard import RowShard
from .footprint import FP32, Shapes, agreements, exchanges, numbers


class FSDP2Footprint:
    """Bytes under FSDP2. Only main weights are kept; blocks are gathered one by one and their gradients reduced."""

    def __init__(self, engine: FSDP2Config, shapes: Shapes, work: Workload, p: int, world: int) -> None:
        self.engine, self.shapes, self.work, self.p, self.world = engine, shapes, work, p, world
        self.ranks = p if engine.hsdp else world
        self.stepped = sum(RowShard(0, self.ranks, shape[0]).rows_per_rank * shape[1:].numel() for shape in shapes.all)
        cuts = [row_cut(shape, self.ranks) for shape in shapes.hidden]
        self.schedule = shapes.schedule(self.ranks, cuts)
        self.held = 0 if engine.offload == "cpu" else self.stepped
        part, state = "body / ranks · 4", f"body / ranks · {shapes.state:g}"
        self.formulas = part, state, part, "2 blocks · i, 1 gradient · 4"

    @property
    def weights(self) -> int:
        return FP32 * self.held

    @property
    def states(self) -> int:
        return round(self.shapes.state * self.held)

    def gradients(self, behind: int) -> int:
        part = 1.0 if self.work.micro_batches > 1 else behind / len(self.shapes.blocks)
        return round(FP32 * self.held * part)

    def gathered(self, behind: int, in_block: bool) -> int:
        block, rest = numbers(self.shapes.blocks[0]), numbers(self.shapes.rest)
        last = behind == len(self.shapes.blocks) - 1  # then no further block is gathered in advance
        weights = 0
        if not self.engine.reshard_after_forward:
            weights = numbers(self.shapes.all)
        elif in_block:
            weights = (1 if last else 2) * block + rest
        return self.work.itemsize * weights + FP32 * block * (behind > 0)

    def transfers(self) -> list[Transfer]:
        repeats, axis = self.work.micro_batches, "vocab" if self.engine.hsdp else "world"
        gathers = repeats * (2 if self.engine.reshard_after_forward else 1)
        parts = len(self.shapes.blocks) + 1
        weights = gathers * self.stepped * self.work.itemsize
        gradients = repeats * self.ranks * self.stepped * FP32
        moved = [
            Transfer("weights", "all-gather", axis, self.ranks, gathers * parts, weights, "body / ranks · i, twice"),
            Transfer("gradients", "reduce-scatter", axis, self.ranks, repeats * parts, gradients, "body · 4"),
            agreements(self.world),
        ]
        if self.engine.hsdp:
            sums, others = self.stepped * FP32, self.world // self.p
            moved.append(Transfer("replicas' gradients", "all-reduce", "dp", others, parts, sums, "body / p · 4"))
        return moved

    def exchanges(self) -> list[Transfer]:
        return exchanges(
            self.schedule, self.shapes.itemsize or self.work.itemsize, "vocab" if self.engine.hsdp else "world"
        )


def row_cut(shape: torch.Size, ranks: int) -> Cut:
    """Cut of a parameter by rows, as FSDP2 shards it."""
    return Cut(RowShard(0, ranks, shape[0]).rows_per_rank * shape[1:].numel())

"""Costs of a step on one rank: memory and traffic in bytes, and FLOPs. This module has the matrix, the head and the
activations. pretrain/engine/footprint.py has the engine's part, pretrain/placement.py the matrix's traffic.

N: tokens per rank and micro-batch. D: width. v: rows per rank. i: bytes per number of the compute dtype.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pretrain.build import BOTH_WAYS, body_flops, body_footprint
from pretrain.config.job import JobConfig
from pretrain.engine.footprint import FP32, BodyFootprint, Shapes
from pretrain.families import Activations
from pretrain.hooks.lens import MEMORY_MIB
from pretrain.lens.method import Method
from pretrain.placement import DISTINCT, Transfer, Workload, transfers
from pretrain.vocab.chunks import chunk_budget, chunk_size, token_bytes
from pretrain.vocab.kernels.base import Kernels
from pretrain.vocab.shard import RowShard


@dataclass(frozen=True)
class Item:
    """Memory that a rank holds for one purpose."""

    name: str
    bytes: int
    formula: str


def total(items: list[Item]) -> int:
    return sum(item.bytes for item in items)


@dataclass(frozen=True)
class StepCost:
    """One step of rank 0."""

    config: JobConfig
    work: Workload
    p: int  # ranks per copy of the matrix
    world: int  # all ranks
    dtype: torch.dtype  # of the matmuls
    kernels: Kernels

    @property
    def shapes(self) -> Shapes:
        return self.body.shapes

    @cached_property
    def activations(self) -> Activations:
        return self.config.model.activations(self.config.engine.activation_checkpointing)

    @cached_property
    def body(self) -> BodyFootprint:
        return body_footprint(self.config, self.work, self.p, self.world)

    @cached_property
    def shard(self) -> RowShard:
        return RowShard(0, self.p, self.work.rows)

    @cached_property
    def chunk(self) -> int:
        """Tokens per rank in one chunk of the loss."""
        memory = self.config.vocab.head_memory_mib
        budget = chunk_budget(self.shard, self.work.width, self.dtype, memory, self.kernels)
        return chunk_size(self.work.tokens, self.p, budget)

    def phases(self) -> dict[str, list[Item]]:
        """Returns the items held at the peak of each phase: the loss, a block's backward, the lookup's, the lens."""
        blocks = len(self.shapes.blocks)
        backwards = [self._held(behind, in_block=True) for behind in range(blocks)]
        phases = {
            "the loss": self._held(0, in_loss=True),
            "a block's backward": max(backwards, key=total),
            "the lookup's": self._held(blocks, in_lookup=True),
        }
        if not self.config.monitor.lens_every:
            return phases
        phases["a look"] = [
            item if item.name in ("weights", "moments", "average", "gathered") else replace(item, bytes=0)
            for item in self._held(0, in_block=True)
        ]
        return {name: [*items, self._lens(name == "a look")] for name, items in phases.items()}

    def _lens(self, looks: bool) -> Item:
        """Returns the lens's memory between two steps: hidden states of a window, twice while stacked; then logits."""
        rows = len(Method().rows(len(self.shapes.blocks)))
        states = rows * self.config.seq_len * self.work.width * self.work.itemsize
        room = states + max(states, MEMORY_MIB * 2**20)
        return Item("lens", room * looks, f"{rows} · T · D · i, twice, or once and {MEMORY_MIB} MiB")

    def _held(self, behind: int, in_loss: bool = False, in_block: bool = False, in_lookup: bool = False) -> list[Item]:
        """Returns the items held after the backward of `behind` blocks."""
        N, D, i = self.work.tokens, self.work.width, self.work.itemsize
        matrix = self.shard.rows * D
        used = (
            self.work.matrices if in_lookup or self.work.micro_batches > 1 else 1
        )  # an untied head's backward comes first
        of_body = self.body.weights, self.body.states, self.body.gradients(behind)
        watched = self.config.monitor.embedding_every > 0 and self.config.vocab.tie == "tied"
        gradients = max(used, 2) if watched else used  # the lookup's gradient separately as well
        state, numbers = self.work.state, matrix * self.work.matrices
        of_matrix = FP32 * numbers, state * numbers, FP32 * gradients * matrix
        names = "weights", "moments", "gradients"
        items = [
            Item(name, body + rows, f"{formula} + v · D · {state if name == 'moments' else FP32}")
            for name, body, rows, formula in zip(names, of_body, of_matrix, self.body.formulas, strict=False)
        ]
        if self.config.ema.on:
            average = FP32 * (self.body.held + numbers)
            items.append(Item("average", average, "4 · (numbers that the body's optimizer steps) + v · D · 4"))

        block, blocks = self.activations, len(self.shapes.blocks) - behind
        held = block.kept * blocks + (block.again + block.gradients) * in_block
        held += D * (2 * in_loss + in_lookup)  # the head's and the last norm's
        sums = blocks * block.sums * FP32
        copy = matrix * i if i < FP32 else 0
        lookup, head = 0, copy * (self.work.micro_batches > 1)  # the micro-batches share it
        if in_loss:
            chunk = self.p * self.chunk
            slab = min(self.kernels.slab_bytes, chunk * self.shard.rows * FP32)
            work = chunk * token_bytes(self.shard, D, self.dtype)
            logits = chunk * (self.shard.rows * i + 2 * D * i) + slab  # before their gradients exist
            head = max(work, logits) + copy + N * D * i
        if in_lookup:
            lookup = (N + 2 * round(DISTINCT * N)) * D * FP32
        return [
            *items,
            Item("gathered", self.body.gathered(behind, in_block), self.body.formulas[3]),
            Item("activations", N * (i * held + sums), block.formula),
            Item("head", head, "chunk · (v · i + D · (4 · i + 8)) + v · D · i + N · D · i"),
            Item("lookup", lookup, "(N + 2 · distinct ids) · D · 4"),
        ]

    def of_matrix(self, lookup: tuple[int, int] | None = None) -> list[Transfer]:
        """Returns the matrix's transfers in the step. lookup: see `pretrain.placement.transfers`."""
        return transfers(self.p, self.work, self.world, -(-self.work.tokens // self.chunk), lookup)

    def of_body(self) -> list[Transfer]:
        return [transfer for transfer in self.body.transfers() if transfer.ranks > 1]

    def of_optimizer(self) -> list[Transfer]:
        """Returns the transfers of the step of the body's optimizer."""
        return self.body.exchanges()

    @property
    def flops(self) -> float:
        """FLOPs of the body: three matmuls with each weight, and a fourth if blocks are computed again."""
        again = 2 if self.config.engine.activation_checkpointing == "block" else 0
        return self.work.tokens * self.work.micro_batches * body_flops(self.config, self.shapes, BOTH_WAYS + again)

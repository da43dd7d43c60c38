"""What a step of one rank holds and moves, in bytes; for the matrix's traffic see pretrain/vocab/parallel.py.

N: tokens of a rank and micro-batch. D: width. v: rows of a rank. i: bytes of a number of the compute dtype.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from pretrain.config import TrainConfig
from pretrain.engine.fsdp2 import FSDP2Config
from pretrain.vocab import Transfer, VocabShard, Workload
from pretrain.vocab.chunks import chunk_budget, chunk_size, token_bytes
from pretrain.vocab.kernels.base import Kernels
from pretrain.vocab.parallel import DISTINCT
from pretrain.vocab.parallel import transfers as matrix_transfers

ACCURATE = 4  # bytes: main weights, gradients, moments and sums are fp32
KEPT = {  # a block's numbers a token, in widths: what its backward finds, and what it makes again
    "none": (16, 0),  # inputs of two norms and four projections (1, 1; 1, 1, 1, 4), qkv 3, GELU's 4
    "block": (1, 15),  # its input alone
    "selective": (11, 7),  # its input, and what its matmuls and its attention have made: 3, 1, 1, 4, 1
}
GRADIENTS = 5  # likewise: at most in work in a block's backward, of its output and of GELU's
SUM, NUMBER = 8, 4  # bytes: of the count of targets, and of a norm


@dataclass(frozen=True)
class Body:
    """The parts that are gathered together: each block, and the rest. Of each, the shapes of its parameters."""

    blocks: list[list[torch.Size]]
    rest: list[torch.Size]

    @classmethod
    def of(cls, config: TrainConfig) -> "Body":
        with torch.device("meta"):
            body = config.model.body()
        blocks: list[nn.Module] = list(body.blocks)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        rest = [parameter.shape for parameter in body.parameters() if id(parameter) not in inside]
        return cls([[parameter.shape for parameter in block.parameters()] for block in blocks], rest)

    @property
    def matmuls(self) -> int:
        """Numbers that every token is multiplied with."""
        return sum(shape.numel() for block in self.blocks for shape in block if len(shape) == 2)

    def shard(self, ranks: int) -> int:
        """Numbers of a rank where each parameter's rows are split over so many, the last rows padded."""
        return sum(padded(part, ranks) for part in (*self.blocks, self.rest))


def padded(part: list[torch.Size], ranks: int) -> int:
    """A rank's numbers of a part."""
    return sum(VocabShard.of(0, ranks, shape[0], multiple=1).rows_per_rank * shape[1:].numel() for shape in part)


@dataclass(frozen=True)
class Item:
    """Something that a rank holds."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Step:
    """One step of rank 0 of `world`, `p` of them to a copy of the matrix. dtype: that it computes in."""

    config: TrainConfig
    work: Workload
    p: int
    world: int
    dtype: torch.dtype
    kernels: Kernels

    @cached_property
    def body(self) -> Body:
        return Body.of(self.config)

    @cached_property
    def ranks(self) -> int:
        """Over which the body is split."""
        return self.p if isinstance(self.config.engine, FSDP2Config) and self.config.engine.hsdp else self.world

    @cached_property
    def shard(self) -> VocabShard:
        return VocabShard.of(0, self.p, self.work.rows, multiple=1)

    @cached_property
    def budget(self) -> int:
        """Tokens of the vocab group that the loss may work on at once."""
        memory = self.config.vocab.head_memory_mib
        return chunk_budget(self.shard, self.work.width, self.dtype, memory, self.kernels)

    @cached_property
    def chunk(self) -> int:
        """Tokens that each rank brings to a chunk."""
        return chunk_size(self.work.tokens, self.p, self.budget)

    def moments(self) -> dict[str, list[Item]]:
        """What is held when most is: in the loss, in a block's backward, and in that of the lookup."""
        blocks = range(len(self.body.blocks))
        backwards = [self._held(behind=done, in_block=True) for done in blocks]
        return {
            "loss": self._held(in_loss=True),
            "a block's backward": max(backwards, key=total),
            "the lookup's backward": self._held(behind=len(blocks), in_lookup=True),
        }

    def _held(
        self, behind: int = 0, in_loss: bool = False, in_block: bool = False, in_lookup: bool = False
    ) -> list[Item]:
        """With that many blocks behind in the backward."""
        engine, work, body = self.config.engine, self.work, self.body
        N, D, i = work.tokens, work.width, work.itemsize
        blocks, block = len(body.blocks), sum(shape.numel() for shape in body.blocks[0])
        rest = sum(shape.numel() for shape in body.rest)
        matrix = work.matrices * self.shard.rows * D
        mine = 0 if engine.offload == "cpu" else body.shard(self.ranks)
        repeats = work.micro_batches > 1
        reduced = mine if repeats else mine * behind // blocks
        matrices = matrix if repeats or in_lookup else self.shard.rows * D

        gathered = 0
        if not engine.reshard_after_forward:
            gathered += i * (blocks * block + rest)
        elif in_block:
            gathered += i * ((2 if behind < blocks - 1 else 1) * block + rest)
        if behind and self.ranks > 1:
            gathered += ACCURATE * block

        kept, again = KEPT[engine.activation_checkpointing]
        widths = kept * (blocks - behind)
        widths += (again + GRADIENTS) * in_block + 2 * in_loss + in_lookup
        statistics = (
            (blocks - behind) * self.config.model.heads * ACCURATE * (engine.activation_checkpointing != "block")
        )

        head = 0
        if in_loss:
            slab = min(self.kernels.slab_bytes, self.p * self.chunk * self.shard.rows * ACCURATE)
            compute_copy = self.shard.rows * D * i if i < ACCURATE else 0
            head = self.p * self.chunk * token_bytes(self.shard, D, self.dtype) + slab + compute_copy + N * D * i
        lookup = N * D * ACCURATE + 2 * round(DISTINCT * N) * D * ACCURATE if in_lookup else 0
        return [
            Item("weights", ACCURATE * (mine + matrix), "4 · (body / ranks + v · D)"),
            Item("moments", 2 * ACCURATE * (mine + matrix), "8 · (body / ranks + v · D)"),
            Item("gradients", ACCURATE * (reduced + matrices), "4 · (body / ranks + v · D)"),
            Item("gathered weights", gathered, "2 blocks · i, and one's gradient · 4"),
            Item("activations", N * (D * i * widths + statistics), f"N · (D · i · {kept} + 4 · heads) a block"),
            Item("head", head, "chunk · (v · i + D · (4 · i + 8)) + slab + v · D · i + N · D · i"),
            Item("lookup", lookup, "N · D · 4 + 2 · distinct ids · D · 4"),
        ]

    def transfers(self, lookup: tuple[int, int] | None = None) -> list[Transfer]:
        """What the step moves. lookup: as for `pretrain.vocab.parallel.transfers`."""
        return self.of_the_matrix(lookup) + [one for one in self.of_the_body() if one.ranks > 1]

    def of_the_matrix(self, lookup: tuple[int, int] | None = None) -> list[Transfer]:
        chunks = -(-self.work.tokens // self.chunk)
        return matrix_transfers(self.p, self.work, self.world, chunks, lookup)

    def of_the_body(self) -> list[Transfer]:
        engine, repeats, ranks = self.config.engine, self.work.micro_batches, self.ranks
        axis = "vocab" if engine.hsdp else "world"
        gathers = repeats * (2 if engine.reshard_after_forward else 1)
        parts, numbers = len(self.body.blocks) + 1, self.body.shard(ranks)
        given = gathers * numbers * self.work.itemsize
        moved = [
            Transfer("count and norms", "all-reduce", "world", self.world, 3, SUM + 2 * NUMBER, "8 + 2 · 4"),
            Transfer("weights", "all-gather", axis, ranks, gathers * parts, given, "body / ranks · i, twice"),
            Transfer(
                "gradients",
                "reduce-scatter",
                axis,
                ranks,
                repeats * parts,
                repeats * ranks * numbers * ACCURATE,
                "body · 4",
            ),
        ]
        if engine.hsdp:
            replicas = self.world // self.p
            moved.append(
                Transfer("replicas' gradients", "all-reduce", "dp", replicas, parts, numbers * ACCURATE, "body / p · 4")
            )
        return moved

    @property
    def flops(self) -> float:
        """Of the body: three matmuls with each weight, and a fourth where blocks are computed again; attention reads
        half of the positions on average.
        """
        tokens = self.work.tokens * self.work.micro_batches
        attention = len(self.body.blocks) * self.config.seq_len * self.work.width
        matmuls = 8 if self.config.engine.activation_checkpointing == "block" else 6
        return matmuls * tokens * (self.body.matmuls + attention)


def total(items: list[Item]) -> int:
    return sum(item.bytes for item in items)

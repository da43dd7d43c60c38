"""What the engine holds and moves for the body in a step of one rank, in bytes, and what a block keeps of its
activations. A formula stands here once.

i: bytes of a number of the compute dtype. `behind`: how many blocks have been through the backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pretrain.config.engine import DeepSpeedConfig, FSDP2Config
from pretrain.config.job import JobConfig
from pretrain.engine.deepspeed import LARGEST_BUCKET
from pretrain.placement import Transfer, Workload
from pretrain.vocab.shard import RowShard

FP32 = 4  # bytes: main weights, gradients, moments and sums
COUNT, NORM = 8, 8  # bytes: what all ranks agree on in a step
PERSISTENT = 100_000  # numbers: ZeRO-3 keeps smaller parameters whole
REUSED = 500_000_000  # numbers: ZeRO-3 keeps what forward has gathered for backward where a body has no more


@dataclass(frozen=True)
class Shapes:
    """Of the body's parameters: of each block, and of the rest."""

    blocks: list[list[torch.Size]]
    rest: list[torch.Size]

    @classmethod
    def of(cls, config: JobConfig) -> "Shapes":
        with torch.device("meta"):
            body = config.model.body()
        blocks: list[nn.Module] = list(body.blocks)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        rest = [parameter.shape for parameter in body.parameters() if id(parameter) not in inside]
        return cls([[parameter.shape for parameter in block.parameters()] for block in blocks], rest)

    @property
    def all(self) -> list[torch.Size]:
        return [shape for part in (*self.blocks, self.rest) for shape in part]

    @property
    def matmuls(self) -> int:
        """Numbers that every token is multiplied with."""
        return sum(shape.numel() for block in self.blocks for shape in block if len(shape) == 2)


@dataclass(frozen=True)
class Activations:
    """Numbers a token of one block. kept: what its backward finds; again: what it makes again; gradients: those of
    activations that it holds at most; sums: in fp32, of the softmax. attention: the width of all heads.
    """

    kept: int
    again: int
    gradients: int
    sums: int
    attention: int
    formula: str

    @classmethod
    def of(cls, config: JobConfig) -> "Activations":
        return FAMILIES[config.model.family](config.model, config.engine.activation_checkpointing)


def _of_gpt2(model: Any, kind: str) -> Activations:
    kept, again = {
        "none": (16, 0),  # inputs of two norms (1, 1) and of four projections (1, 1, 1, 4), qkv (3), GELU's input (4)
        "block": (1, 15),  # its input alone
        "selective": (11, 7),  # its input, and what matmuls (3, 1, 4, 1) and attention (1) have made
    }[kind]
    D, heads = model.width, model.heads
    gradients = 5 * D  # of its output and of GELU's
    formula = f"a block: N · (D · i · {kept} + 4 · heads)"
    return Activations(kept * D, again * D, gradients, heads * (kind != "block"), D, formula)


def _of_llama(model: Any, kind: str) -> Activations:
    """As on a GPU, where a norm keeps its input alone."""
    D, F, queries, keys = model.width, model.inner, model.heads * model.size, model.kv_heads * model.size
    qkv, turned = queries + 2 * keys, queries + keys
    everything = 4 * D + qkv + turned + queries + 4 * F  # as above, and queries and keys once more; four of the MLP
    kept, again, formula = {
        "none": (everything, 0, "4 · D + 3 · (queries + keys) + 4 · F"),
        "block": (D, everything - D, "D"),
        "selective": (
            3 * D + qkv + queries + 2 * F,
            3 * D + turned + 2 * F,
            "3 · D + 2 · (queries + keys) + 2 · F",
        ),
    }[kind]
    sums = model.heads + (model.heads + model.kv_heads) * model.qk_norm
    formula = f"a block: N · (i · ({formula}) + 4 · heads)"
    return Activations(kept, again, D + 2 * F, sums * (kind != "block"), queries, formula)


FAMILIES: dict[str, Callable[[Any, str], Activations]] = {"gpt2": _of_gpt2, "llama": _of_llama}


def numbers(part: Sequence[torch.Size]) -> int:
    return sum(shape.numel() for shape in part)


class BodyFootprint(Protocol):
    """One engine's. In `formulas` those of the four things that are held."""

    formulas: tuple[str, str, str, str]
    stepped: int  # numbers that this rank's AdamW steps

    @property
    def weights(self) -> int: ...

    @property
    def moments(self) -> int: ...

    def gradients(self, behind: int) -> int: ...

    def gathered(self, behind: int, in_block: bool) -> int:
        """What comes and goes within a step: others' weights, and gradients on their way."""
        ...

    def transfers(self) -> list[Transfer]: ...


def body_of(config: JobConfig, shapes: Shapes, work: Workload, p: int, world: int) -> BodyFootprint:
    """With p ranks on the vocab axis."""
    if isinstance(config.engine, DeepSpeedConfig):
        return OfDeepSpeed(config.engine, shapes, work, world)
    return OfFSDP2(config.engine, shapes, work, p, world)


class OfFSDP2:
    """Main weights are the only ones kept; a block's are gathered for it, and its gradient is reduced at once."""

    formulas = "body / ranks · 4", "body / ranks · 8", "body / ranks · 4", "2 blocks · i, 1 gradient · 4"

    def __init__(self, engine: FSDP2Config, shapes: Shapes, work: Workload, p: int, world: int) -> None:
        self.engine, self.shapes, self.work, self.p, self.world = engine, shapes, work, p, world
        self.ranks = p if engine.hsdp else world
        self.stepped = sum(RowShard(0, self.ranks, shape[0]).rows_per_rank * shape[1:].numel() for shape in shapes.all)
        self._held = 0 if engine.offload == "cpu" else self.stepped

    @property
    def weights(self) -> int:
        return FP32 * self._held

    @property
    def moments(self) -> int:
        return 2 * FP32 * self._held

    def gradients(self, behind: int) -> int:
        part = 1.0 if self.work.micro_batches > 1 else behind / len(self.shapes.blocks)
        return round(FP32 * self._held * part)

    def gathered(self, behind: int, in_block: bool) -> int:
        block, rest = numbers(self.shapes.blocks[0]), numbers(self.shapes.rest)
        last = behind == len(self.shapes.blocks) - 1  # then there is none to gather ahead
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
            _agreed(self.world),
        ]
        if self.engine.hsdp:
            sums, others = self.stepped * FP32, self.world // self.p
            moved.append(Transfer("replicas' gradients", "all-reduce", "dp", others, parts, sums, "body / p · 4"))
        return moved


class OfDeepSpeed:
    """ZeRO's stages. Gradients are reduced in buckets as large as the body, or as LARGEST_BUCKET."""

    def __init__(self, engine: DeepSpeedConfig, shapes: Shapes, work: Workload, world: int) -> None:
        self.engine, self.shapes, self.work, self.world = engine, shapes, work, world
        self.all = numbers(shapes.all)
        matrices = [shape for shape in shapes.all if len(shape) == 2]
        groups = numbers(matrices), self.all - numbers(matrices)  # decayed or not
        self.parts = [-(-group // (2 * world)) * 2 for group in groups]
        self.cut = sum(-(-shape.numel() // world) for shape in shapes.all)  # at stage 3
        self.large = [shape for shape in shapes.all if shape.numel() > PERSISTENT]
        self.stepped = (self.all, sum(self.parts), sum(self.parts), self.cut)[engine.zero_stage]
        self._held = 0 if engine.offload == "cpu" else self.stepped
        self.low = work.itemsize < FP32
        self.bucket = min(self.all, LARGEST_BUCKET)
        stage, copies = engine.zero_stage, "body · i + body / ranks · 4"
        self.formulas = (
            ("body · 4", copies, copies, "body / ranks · (i + 4)")[stage],
            ("body · 8", "body / ranks · 8", "body / ranks · 8", "body / ranks · 8")[stage],
            ("body · 4", "body · (i + 4)", "body / ranks · 4", "body / ranks · 4")[stage],
            ("bucket · 4, body · i", "bucket · 4", "bucket · (4 + 2 · i)", "bucket · (4 + 2 · i), body · i")[stage],
        )

    @property
    def weights(self) -> int:
        stage, item = self.engine.zero_stage, self.work.itemsize
        if stage == 0:
            return FP32 * self.all
        small = self.all - numbers(self.large)
        return FP32 * self._held + item * (self.all if stage < 3 else self.cut + small)

    @property
    def moments(self) -> int:
        return 2 * FP32 * self._held

    def gradients(self, behind: int) -> int:
        part = 1.0 if self.work.micro_batches > 1 else behind / len(self.shapes.blocks)
        own = self.work.itemsize if self.engine.zero_stage == 1 else 0
        return round(part * ((FP32 + own) * self.all if self.engine.zero_stage < 2 else FP32 * self._held))

    def gathered(self, behind: int, in_block: bool) -> int:
        stage, item = self.engine.zero_stage, self.work.itemsize
        bucket = self.bucket * (FP32 if stage < 2 else FP32 + 2 * item) * (behind > 0)
        if stage == 0:
            computing = behind < len(self.shapes.blocks)
            return bucket + item * self.shapes.matmuls * (self.low and computing)  # autocast's copies
        if stage < 3:
            return bucket
        live = numbers(self.large) if self.all <= REUSED else 2 * numbers(self.shapes.blocks[0])
        return bucket + item * live

    def transfers(self) -> list[Transfer]:
        stage, repeats, item = self.engine.zero_stage, self.work.micro_batches, self.work.itemsize
        buckets = -(-self.all // LARGEST_BUCKET)

        def moved(purpose: str, kind: str, calls: int, given: int, formula: str) -> Transfer:
            return Transfer(purpose, kind, "world", self.world, calls, given, formula)

        if stage == 3:
            gathers = repeats * (1 if self.all <= REUSED else 2)
            small = [shape for shape in self.shapes.all if shape.numel() <= PERSISTENT]
            given = gathers * sum(-(-shape.numel() // self.world) for shape in self.large)
            given += sum(-(-shape.numel() // self.world) for shape in small)
            summed = repeats * self.world * self.cut * FP32
            return [
                moved("weights", "all-gather", gathers + len(small), given * item, "body / ranks · i"),
                moved("gradients", "reduce-scatter", repeats * buckets, summed, "body · 4"),
                _agreed(self.world),
            ]
        reductions = repeats if stage == 2 else 1
        padded = self.world * sum(self.parts) if stage == 1 and self.low else self.all
        summed = reductions * padded * FP32
        gradients = moved("gradients", "all-reduce", reductions * buckets, summed, "body · 4")
        if stage == 0:
            return [gradients, _agreed(self.world)]
        weights = moved("weights", "all-gather", len(self.parts), sum(self.parts) * item, "body / ranks · i")
        return [gradients, weights, _agreed(self.world)]


def _agreed(world: int) -> Transfer:
    """The count of targets, and the norms of body and matrix."""
    return Transfer("count and norms", "all-reduce", "world", world, 3, COUNT + 2 * NORM, "8 + 2 · 8")

"""Time, memory and traffic of a training step on many GPUs, for three ways to hold the vocabulary. Nothing is measured.

Separate from launch/planner.py, which plans our own runs: this is a comparison, on a machine at the rates that good
kernels attain. Bytes come from the planner's counts (ours, and the body of FSDP2) and from the formulas below.
D: width. V: rows. t: ranks of tensor parallelism. i: bytes of a number in matmuls, which are in bf16.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from launch.hardware import HARDWARE
from launch.step import StepCost, total
from pretrain.build import BOTH_WAYS, vocab_workload
from pretrain.config.engine import FSDP2Config
from pretrain.config.job import JobConfig
from pretrain.engine.footprint import FP32, Shapes, numbers
from pretrain.engine.fsdp2_footprint import FSDP2Footprint
from pretrain.optim import body_optimizer
from pretrain.placement import STATISTICS, Transfer, Workload, update_bytes
from pretrain.vocab.kernels import choose_kernels

BF16, US = 2, 1e-6
CHUNKS = 8  # of the tokens, in FSDP2's chunked loss
FSDP2_LOGIT = 12  # bytes held per logit: in bf16 and in fp32, and the gradients of both; as in torchtitan's loss
MEGATRON_LOGIT = 8  # bytes held: logits in bf16, their softmax in fp32, their gradient in bf16
TOUCHED = 10  # bytes that the loss moves per logit, in every system: fp32 logits twice, a bf16 gradient
CARD = HARDWARE["h100"]


@dataclass(frozen=True)
class Fabric:
    """A GPU and the links to others; by default of an H100 SXM. Latencies: NCCL's tuning table, Simple protocol."""

    flops: float = 790e12  # attained by large bf16 matmuls
    memory: float = 0.9 * 3350e9  # bytes/s
    near: float = 0.8 * 450e9  # bytes/s over NVLink, one way
    far: float = 0.8 * 50e9  # bytes/s over a GPU's own 400 Gb/s InfiniBand card
    node: int = 8  # GPUs
    base: float = 8.4 * US  # of a collective
    ring: tuple[float, float] = (3.4 * US, 14 * US)  # of a hop within a node, and between nodes
    tree: tuple[float, float] = (4.0 * US, 14 * US)

    def seconds(self, transfer: Transfer, stride: int = 1) -> float:
        """Time of all calls of a transfer. stride: distance between two neighbours of the group, in ranks.

        A group with k ranks per node sends 1/k of its bytes to other nodes. Both links work at the same time.
        All-gathers and reduce-scatters pass all ranks (ring); an all-reduce passes its nodes as a tree, twice.
        """
        ranks = transfer.ranks
        if ranks == 1:
            return 0.0
        local = max(1, min(ranks, self.node // stride))
        nodes = ranks // local
        outside = 0.0 if nodes == 1 else 1 / local
        if transfer.kind == "all-to-all":
            outside = (ranks - local) / (ranks - 1)
            hops = self.ring[nodes > 1]
        elif transfer.kind == "all-reduce":
            hops = 2 * ((local - 1) * self.tree[0] + math.log2(nodes) * self.tree[1])
        else:
            between = nodes if nodes > 1 else 0
            hops = (ranks - max(1, nodes)) * self.ring[0] + between * self.ring[1]
        moving = max(transfer.sent * (1 - outside) / self.near, transfer.sent * outside / self.far)
        return moving + transfer.calls * (self.base + hops)


H100 = Fabric()


@dataclass(frozen=True)
class Point:
    """A step of one system with one layout."""

    layout: str
    seconds: float
    memory: float  # bytes that a rank holds at most
    head: float  # bytes that a rank sends for lookup, head and loss, and for the gradients of the two matrices
    tokens: int  # per rank

    @property
    def fits(self) -> bool:
        return self.memory <= CARD.memory - CARD.reserved

    @property
    def rate(self) -> float:
        """Tokens per second and rank."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Step(StepCost):
    """The planner's costs of FSDP2, with shapes that are already known: building a body takes a tenth of a second."""

    known: Shapes

    @cached_property
    def body(self) -> FSDP2Footprint:
        assert isinstance(self.config.engine, FSDP2Config)
        return FSDP2Footprint(self.config.engine, self.known, self.work, self.p, self.world)


@dataclass(frozen=True)
class Training:
    """A training of `world` ranks with a vocabulary of `rows`. Each rank has one micro-batch per step."""

    config: JobConfig
    rows: int
    world: int
    fabric: Fabric = H100

    @cached_property
    def shapes(self) -> Shapes:
        with torch.device("meta"):
            return Shapes.of(self.config.model.body(), body_optimizer(self.config.optim))

    def step(self, p: int, hsdp: bool, rows: int | None = None) -> StepCost:
        """Returns the planner's costs with p ranks per copy of the matrix. hsdp: also per copy of the body."""
        config = replace(self.config, engine=replace(self.config.engine, hsdp=hsdp))
        work = vocab_workload(config, rows or self.rows, self.world, BF16)
        kernels = choose_kernels(torch.device("cuda"))
        return _Step(config, work, p, self.world, torch.bfloat16, kernels, self.shapes)

    @property
    def work(self) -> Workload:
        return self.step(1, hsdp=False).work

    def body_seconds(self) -> float:
        """Matmuls and attention at the rate of matmuls. Each activation is written and read, and so is its gradient."""
        step = self.step(1, hsdp=False)
        block = step.activations
        touched = 4 * BF16 * (block.kept + block.again) * len(step.shapes.blocks) * step.work.tokens
        return step.flops / self.fabric.flops + touched / self.fabric.memory

    def head_seconds(self, gradient: float) -> float:
        """Three matmuls and the loss. gradient: bytes read and written to sum the gradient of the head's rows."""
        work = self.work
        matmuls = BOTH_WAYS * work.tokens * work.rows * work.width / self.fabric.flops
        return matmuls + (TOUCHED * work.tokens * work.rows + gradient) / self.fabric.memory

    def update_seconds(self, parameters: float) -> float:
        """AdamW on this many parameters of a rank."""
        return parameters * update_bytes(self.work.state) / self.fabric.memory


def fastest(points: list[Point]) -> Point | None:
    """Returns the fastest of the layouts that fit the GPU; None if none does. A hundredth of speed yields to memory."""
    fitting = [point for point in points if point.fits]
    most = max((point.rate for point in fitting), default=0.0)
    return min((point for point in fitting if point.rate > 0.99 * most), key=lambda point: point.memory, default=None)


def powers(most: int, least: int = 1) -> list[int]:
    return [2**k for k in range(most.bit_length()) if least <= 2**k <= most]


# --- Rowshard ---------------------------------------------------------------------------------------------------------


def rowshard(training: Training) -> list[Point]:
    """Every split of the matrix, with the body sharded over all ranks or over the ranks of a copy (HSDP).

    The body's traffic hides behind its matmuls, and the tokens' behind the head's. The lookup, and the sum over copies
    of the matrix, hide behind nothing.
    """
    return [_rowshard(training, p, hsdp) for p in powers(training.world) for hsdp in {False, 1 < p < training.world}]


def _rowshard(training: Training, p: int, hsdp: bool) -> Point:
    step, fabric = training.step(p, hsdp), training.fabric
    strides = {"vocab": 1, "world": 1, "dp": p}
    moved = step.of_matrix()
    times = {one.purpose: fabric.seconds(one, strides[one.axis]) for one in moved}
    alone = sum(times[one.purpose] for one in moved if one.kind in ("all-to-all", "all-reduce"))
    body = sum(fabric.seconds(one, strides[one.axis]) for one in step.of_body())
    matrix, chunks = step.shard.rows * step.work.width, -(-step.work.tokens // step.chunk)
    head = training.head_seconds(matrix * ((BF16 + FP32) + 2 * FP32 * chunks))  # and the compute copy of the rows
    seconds = max(training.body_seconds(), body) + max(head, sum(times.values()) - alone) + alone
    seconds += training.update_seconds(step.body.stepped + matrix * step.work.matrices)
    layout = f"matrix over {p:,}, body over {p if hsdp else training.world:,}"
    memory = max(map(total, step.phases().values()))
    return Point(layout, seconds, memory, sum(one.sent for one in moved), step.work.tokens)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def fsdp2(training: Training, chunks: int = 1) -> list[Point]:
    """Plain FSDP2, as in torchtitan: embedding and head are gathered and reduced as any block. With fewer ranks per
    shard group than ranks it is HSDP. All traffic hides behind all matmuls, except the first gather of the embedding
    and the last reduction of its gradient: nothing is left to compute beside them.
    """
    return [_fsdp2(training, ranks, chunks) for ranks in powers(training.world, least=min(8, training.world))]


def gathered_matrices(work: Workload, ranks: int, copies: int) -> dict[str, list[Transfer]]:
    """Transfers of an untied embedding and head as FSDP2 units on `ranks`, with `copies` replicas of the shards.

    The embedding is gathered in forward and again in backward. The head is gathered once: its backward comes at once.
    """
    part = -(-work.rows // ranks) * work.width

    def unit(gathers: int) -> list[Transfer]:
        return [
            Transfer("rows", "all-gather", "shard", ranks, gathers, gathers * part * BF16, "V · D / ranks · i"),
            Transfer("rows' gradients", "reduce-scatter", "shard", ranks, 1, ranks * part * FP32, "V · D · 4"),
            Transfer("replicas' gradients", "all-reduce", "replica", copies, 1, part * FP32, "V · D / ranks · 4"),
        ]

    return {"embedding": unit(2), "head": unit(1)}


def fsdp2_memory(training: Training, ranks: int, chunks: int) -> float:
    """Peak of three phases. The body is the planner's. A gathered matrix takes 2 bytes per number, its gradient 2, and
    the buffer of the reduction 4; this buffer may exist beside the logits of the last chunk.
    """
    work, hsdp = training.work, ranks < training.world
    body = training.step(ranks, hsdp, rows=ranks)  # almost no vocabulary
    phases = {
        name: sum(item.bytes for item in items if item.name not in ("head", "lookup"))
        for name, items in body.phases().items()
    }
    matrix, part = work.rows * work.width, -(-work.rows // ranks) * work.width
    kept = (FP32 + work.state) * work.matrices * part
    logits = FSDP2_LOGIT * work.tokens * work.rows / chunks
    reduction = (2 * BF16 + FP32) * matrix
    return kept + max(
        phases["the loss"] + max(2 * BF16 * matrix + logits, reduction),
        phases["a block's backward"] + FP32 * part,
        phases["the lookup's"] + FP32 * part + reduction,
    )


def _fsdp2(training: Training, ranks: int, chunks: int) -> Point:
    fabric, work, copies = training.fabric, training.work, training.world // ranks
    step = training.step(ranks, hsdp=copies > 1)
    units = gathered_matrices(work, ranks, copies)
    strides = {"shard": 1, "vocab": 1, "world": 1, "replica": ranks, "dp": ranks}
    gather, *sums = units["embedding"]
    alone = fabric.seconds(replace(gather, calls=1, given=gather.given // 2))
    alone += sum(fabric.seconds(one, strides[one.axis]) for one in sums)
    matrices = [one for unit in units.values() for one in unit]
    hidden = sum(fabric.seconds(one, strides[one.axis]) for one in (*step.of_body(), *matrices)) - alone
    head = training.head_seconds(2 * BF16 * chunks * work.rows * work.width)
    seconds = max(training.body_seconds() + head, hidden) + alone
    seconds += training.update_seconds(step.body.stepped + work.matrices * work.rows * work.width / ranks)
    layout = f"all over {ranks:,}" if copies == 1 else f"HSDP, {ranks:,} × {copies:,}"
    return Point(layout, seconds, fsdp2_memory(training, ranks, chunks), sum(m.sent for m in matrices), work.tokens)


# --- Megatron-Core ----------------------------------------------------------------------------------------------------


def megatron(training: Training, hides: bool = False) -> list[Point]:
    """Tensor parallelism over t GPUs of a node for body and vocabulary, and the distributed optimizer over the rest.

    A group of t ranks has t micro-batches per step, so that a rank has as many tokens as elsewhere. The sums of
    backward hide behind matmuls, those of forward only if it `hides` them (--tp-comm-overlap). The optimizer's traffic
    hides behind the matmuls of one micro-batch.
    """
    return [_megatron(training, t, hides) for t in powers(min(8, training.world))]


def tensor_parallel(
    work: Workload, layers: int, t: int, micro_batches: int, itemsize: int = BF16
) -> dict[str, Transfer]:
    """Transfers of tensor parallelism in a step. work.tokens: of a micro-batch, which all t ranks have.

    A block sums twice in forward and twice in backward; the embedding sums once, and so does the head's backward. With
    sequence parallelism each sum is a reduce-scatter and an all-gather, of the same bytes.
    """
    hidden = micro_batches * work.tokens * work.width * itemsize
    statistics = micro_batches * STATISTICS * work.tokens * FP32

    def sums(purpose: str, count: int, given: int) -> Transfer:
        return Transfer(purpose, "all-reduce", "tp", t, count * micro_batches, given, "")

    return {
        "blocks": sums("blocks", 4 * layers, 4 * layers * hidden),
        "embedding and head": sums("embedding and head", 2, 2 * hidden),
        "statistics": sums("statistics", STATISTICS, statistics),
    }


def megatron_memory(training: Training, t: int) -> float:
    """Weights in bf16, gradients in fp32, a share of fp32 weights and moments; activations split over t as well."""
    step = training.step(1, hsdp=False)
    work, block = step.work, step.activations
    parameters = numbers(step.shapes.all) + work.matrices * work.rows * work.width
    held = len(step.shapes.blocks) * (BF16 * block.kept + FP32 * block.sums) + BF16 * (block.again + block.gradients)
    logits = MEGATRON_LOGIT * work.rows
    weights = parameters * ((BF16 + FP32) / t + (FP32 + work.state) / training.world)
    return weights + work.tokens * (held + logits) / t


def _megatron(training: Training, t: int, hides: bool) -> Point:
    fabric, step, copies = training.fabric, training.step(1, hsdp=False), training.world // t
    work = step.work
    matrices = work.matrices * work.rows * work.width
    parameters = numbers(step.shapes.all) + matrices
    within = tensor_parallel(work, len(step.shapes.blocks), t, micro_batches=t)
    buckets = math.ceil(parameters / t / max(40e6, 1e6 * copies))  # Megatron's default
    between = [
        Transfer("gradients", "reduce-scatter", "dp", copies, buckets, int(parameters / t * FP32), ""),
        Transfer("weights", "all-gather", "dp", copies, buckets, int(parameters / t / copies * BF16), ""),
    ]
    compute = training.body_seconds() + training.head_seconds(2 * FP32 * matrices / work.matrices)
    sums = sum(fabric.seconds(one) for one in within.values())
    alone = 0.0 if hides else (sums + fabric.seconds(within["statistics"])) / 2  # all statistics, half of the others
    seconds = max(compute, sums - alone) + alone
    seconds += max(0.0, sum(fabric.seconds(one, stride=t) for one in between) - seconds / t)
    seconds += training.update_seconds(parameters / training.world)
    head = sum(within[name].sent for name in ("embedding and head", "statistics"))
    head += sum(one.sent for one in between) * matrices / parameters
    return Point(f"TP {t}, DP {copies:,}", seconds, megatron_memory(training, t), head, work.tokens)

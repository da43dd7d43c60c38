"""Chooses the number of ranks per copy of the matrix: `vocab.parallel=auto`.

Estimates one step for each size p of the axis. With a larger p, a rank holds, sums and updates fewer rows, but more
ranks exchange their tokens:

    matmuls    6·N·V·D per micro-batch, for every p
    tokens     (p-1)·N·D hidden states out and gradients back, and (p-1)·N·3p statistics, per micro-batch; overlapped
               with the matmuls on a GPU
    lookup     (p-1)/p of the distinct rows, about N/3, out and their gradients back, per micro-batch
    replicas   all-reduce of the gradient of V·D/p, once per step, if there are several copies
    rows       the optimizer on V·D/p once per step, its compute copy and its gradient once per micro-batch

Gathering the weights instead, as FSDP does, moves V·D out and back per micro-batch: more than the tokens, if the group
has fewer tokens than rows, M < V. It is shown for comparison, never chosen.
"""

import math
from dataclasses import dataclass

from .config.vocab import VocabConfig
from .vocab.shard import RowShard

DISTINCT = 1 / 3  # of the ids in text
WEIGHT = GRADIENT = STATISTIC = 4  # bytes: fp32
ID = 8  # bytes: int64
STATISTICS = 3  # per token and shard: max, sum, and the target's logit; label smoothing needs one more
TOUCH = 14  # bytes read and written per number: compute copy and gradient of a micro-batch
SLOWER = 1.05  # among sizes within this factor of the fastest, memory decides
CLEARLY_SLOWER, CLEARLY_LARGER = 1.25, 2.0  # factors over auto's choice that are reported
WORTH_A_WORD = 256 * 2**20  # bytes; less extra memory is not reported


@dataclass(frozen=True)
class Workload:
    """Work of the matrix in a step."""

    rows: int  # V, padding included
    width: int  # D
    matrices: int  # 1 tied, 2 untied
    tokens: int  # N, per rank and micro-batch
    micro_batches: int  # per rank and step
    itemsize: int  # bytes of a number of the compute dtype
    state: int  # bytes of optimizer state per number
    smoothing: bool = False  # labels are smoothed

    @property
    def held(self) -> int:
        """Bytes per number: main weight, gradient and state."""
        return WEIGHT + GRADIENT + self.state

    def rows_of_a_rank(self, p: int) -> int:
        """Returns the rows v of a rank, with p ranks per copy."""
        return RowShard(0, p, self.rows).rows_per_rank


@dataclass(frozen=True)
class Transfer:
    """Collectives for one purpose in a step."""

    purpose: str
    kind: str  # all-gather, reduce-scatter, all-reduce or all-to-all
    axis: str  # vocab, dp or world
    ranks: int  # on the axis
    calls: int
    given: int  # bytes that a rank passes to all calls; for an all-to-all, without its own part
    formula: str  # for the bytes of one call

    @property
    def sent(self) -> float:
        """Bytes that a rank sends to others."""
        others = self.ranks - 1
        times = {"all-gather": others, "reduce-scatter": others / self.ranks, "all-reduce": 2 * others / self.ranks}
        return times.get(self.kind, 1) * self.given


@dataclass(frozen=True)
class Machine:
    """Speeds of compute and links. Only their ratios matter."""

    world: int  # ranks
    node: int  # ranks per node
    flops: float  # of a rank's matmuls, per second
    memory: float  # bytes/s of a rank's memory
    near: float  # bytes/s that a rank sends within its node
    far: float  # bytes/s that a rank sends to other nodes
    overlaps: bool  # a rank sends while it computes

    @classmethod
    def of(cls, device_type: str, world: int, node: int) -> "Machine":
        """Returns round numbers for a datacenter GPU with NVLink and a 200 Gb/s NIC, or a CPU core with gloo."""
        if device_type == "cuda":
            return cls(world, node, flops=4e14, memory=2e12, near=2e11, far=2.5e10, overlaps=True)
        return cls(world, node, flops=1e11, memory=5e9, near=1e9, far=1e9, overlaps=False)


@dataclass(frozen=True)
class Estimate:
    """Estimate of one step of a rank, with one size of the vocab axis."""

    ranks: int  # p, per copy
    seconds: float  # of the head, the lookup and the rows' optimizer
    sent: float  # bytes
    held: float  # bytes


@dataclass(frozen=True)
class Parallel:
    """Chosen size of the vocab axis."""

    ranks: int
    why: str  # for the user; "" if there is nothing to say


def choose_parallel(asked: str, work: Workload, machine: Machine) -> Parallel:
    """Returns the size `asked`; for "auto", the size with the least memory among those close to the fastest.

    Raises ValueError if `asked` is a number that does not divide the world.
    """
    VocabConfig(parallel=asked).check_world(machine.world)
    sizes = {p: estimate(p, work, machine) for p in range(1, machine.world + 1) if machine.world % p == 0}
    fastest = min(size.seconds for size in sizes.values())
    best = min((size for size in sizes.values() if size.seconds <= SLOWER * fastest), key=lambda size: size.held)
    chosen = best if asked == "auto" else sizes[int(asked)]
    slower = chosen.seconds > CLEARLY_SLOWER * best.seconds
    larger = chosen.held > max(CLEARLY_LARGER * best.held, best.held + WORTH_A_WORD)
    if asked == "auto":
        why = f"vocab.parallel=auto: {best.ranks} of {machine.world} ranks share a copy"
    elif slower or larger:
        why = f"vocab.parallel={asked} is clearly worse than {best.ranks}, which auto would choose"
    else:
        return Parallel(chosen.ranks, "")
    if machine.world == 1:
        return Parallel(1, "")
    return Parallel(chosen.ranks, f"{why}\n{_table(list(sizes.values()), weights_gathered(work, machine), chosen)}")


def transfers(
    p: int, work: Workload, world: int, chunks: int = 1, lookup: tuple[int, int] | None = None
) -> list[Transfer]:
    """Lists the matrix's transfers in a step, with p ranks per copy. chunks: of each micro-batch's loss.

    lookup: rows that a rank sends, and receives, for the lookups of a step; None: as in typical text.
    """
    N, D, v, repeats = work.tokens, work.width, work.rows_of_a_rank(p), work.micro_batches
    moved: list[Transfer] = []

    def add(purpose: str, kind: str, calls: int, given: int, formula: str, axis: str = "vocab", ranks: int = p) -> None:
        if ranks > 1:
            moved.append(Transfer(purpose, kind, axis, ranks, calls, given, formula))

    mean = round(repeats * DISTINCT * N * (p - 1) / p)
    rows_sent, rows_got = lookup or (mean, mean)
    add("rows looked up", "all-to-all", repeats, rows_sent * D * work.itemsize, "(p-1)/p · distinct ids · D · i")
    add("looked-up rows' gradients", "all-to-all", repeats, rows_got * D * GRADIENT, "(p-1)/p · distinct ids · D · 4")
    add("targets", "all-gather", repeats, repeats * N * ID, "N · 8")
    add("hidden states", "all-gather", repeats * chunks, repeats * N * D * work.itemsize, "N · D · i")
    statistics = STATISTICS + work.smoothing
    given = repeats * statistics * p * N * STATISTIC
    add("softmax statistics", "all-gather", repeats * chunks, given, f"{statistics} · p·N · 4")
    add("hidden states' gradients", "reduce-scatter", repeats * chunks, repeats * p * N * D * GRADIENT, "p·N · D · 4")
    add(
        "replicas' gradients",
        "all-reduce",
        work.matrices,
        work.matrices * v * D * GRADIENT,
        "v · D · 4 per matrix",
        axis="dp",
        ranks=world // p,
    )
    return moved


def estimate(p: int, work: Workload, machine: Machine) -> Estimate:
    """Estimates one step with p ranks per copy."""
    fits = p <= machine.node and machine.node % p == 0  # otherwise a group spans nodes
    inside = machine.near if fits else machine.far
    outside = machine.near if machine.world <= machine.node else machine.far
    numbers = work.rows_of_a_rank(p) * work.width * work.matrices

    moved = transfers(p, work, machine.world)
    lookup = sum(one.sent for one in moved if one.kind == "all-to-all")
    replicas = sum(one.sent for one in moved if one.axis == "dp")
    tokens = sum(one.sent for one in moved) - lookup - replicas
    matmuls = _matmuls(work, machine)
    head = max(matmuls, tokens / inside) if machine.overlaps else matmuls + tokens / inside
    rows = numbers * (update_bytes(work.state) + TOUCH * work.micro_batches) / machine.memory
    seconds = head + lookup / inside + replicas / outside + rows
    return Estimate(p, seconds, tokens + lookup + replicas, numbers * (work.held + work.itemsize))


def weights_gathered(work: Workload, machine: Machine) -> Estimate:
    """Estimates the step with the rows sharded over all ranks and gathered per micro-batch, as FSDP does."""
    numbers = work.rows * work.width * work.matrices
    others = (machine.world - 1) / machine.world
    sent = work.micro_batches * others * numbers * (work.itemsize + GRADIENT)
    rows = numbers * (update_bytes(work.state) / machine.world + TOUCH * work.micro_batches) / machine.memory
    link = machine.near if machine.world <= machine.node else machine.far
    held = numbers * (work.held / machine.world + work.itemsize + GRADIENT)
    return Estimate(machine.world, _matmuls(work, machine) + sent / link + rows, sent, held)


def update_bytes(state: float) -> float:
    """Returns the bytes per number of an optimizer step: read and write weight and state, read the gradient."""
    return 2 * (WEIGHT + state) + GRADIENT


def _matmuls(work: Workload, machine: Machine) -> float:
    return work.micro_batches * 6 * work.tokens * work.rows * work.width / machine.flops


def _table(sizes: list[Estimate], gathered: Estimate, chosen: Estimate) -> str:
    """Formats a line per size. The figures are estimates, for comparison only."""
    lines = ["  ranks per copy    head, ms per step    sent, MiB per step    held, MiB"]
    for size in [*sizes, gathered]:
        name = "(FSDP2)" if size is gathered else f"{size.ranks:,}"
        seconds, sent, held = _round(size.seconds * 1e3), _round(size.sent / 2**20), _round(size.held / 2**20)
        lines.append(f"  {name:>14}{seconds:>21}{sent:>22}{held:>13}" + " <" * (size is chosen))
    return "\n".join(lines)


def _round(value: float) -> str:
    """Formats two digits: an estimate is not more precise."""
    digits = max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 2)}f}"

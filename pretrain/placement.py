"""How many ranks should share one copy of the matrix: `vocab.parallel=auto`.

An estimate of one step for each size p of the axis. With more ranks a rank holds, sums and updates fewer rows, but its
group's tokens have to meet all of them:

    matmuls    6·N·V·D a micro-batch, whatever p is
    tokens     (p-1)·N·D hidden states out and gradients back, and (p-1)·N·3p statistics, a micro-batch; behind the
               matmuls on a GPU
    lookup     (p-1)/p of the distinct rows, about N/3, out and their gradients back, a micro-batch
    replicas   all-reduce of the gradient of V·D/p, once a step, where there are several copies
    rows       the optimizer on V·D/p once a step, its compute copy and its gradient once a micro-batch

Gathering the weights instead, as FSDP does, moves V·D out and back a micro-batch: more than the tokens as long as the
group has fewer of them than there are rows, M < V. It is shown beside the others, not chosen.
"""

import math
from dataclasses import dataclass

from .config.vocab import VocabConfig
from .vocab.shard import RowShard

DISTINCT = 1 / 3  # of the ids in text
WEIGHT = GRADIENT = STATISTIC = 4  # bytes: fp32
ID = 8  # bytes: int64
STATISTICS = 3  # a token and shard: max, sum, and the target's logit; label smoothing needs one more
TOUCH = 14  # bytes read and written per number: compute copy and gradient of a micro-batch
SLOWER = 1.05  # memory decides between sizes that are no slower than this
CLEARLY_SLOWER, CLEARLY_LARGER = 1.25, 2.0  # than what auto chooses: worth a word
WORTH_A_WORD = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Workload:
    """What the matrix has to do in a step."""

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
        """The rows v of a rank, with p ranks to a copy."""
        return RowShard(0, p, self.rows).rows_per_rank


@dataclass(frozen=True)
class Transfer:
    """The collectives of one purpose in a step."""

    purpose: str
    kind: str  # all-gather, reduce-scatter, all-reduce or all-to-all
    axis: str  # vocab, dp or world
    ranks: int  # on the axis
    calls: int
    given: int  # bytes that a rank hands to all the calls; to an all-to-all, those for others
    formula: str  # of the bytes of one call

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, its own part never counted."""
        others = self.ranks - 1
        times = {"all-gather": others, "reduce-scatter": others / self.ranks, "all-reduce": 2 * others / self.ranks}
        return times.get(self.kind, 1) * self.given


@dataclass(frozen=True)
class Machine:
    """What the ranks compute and send with. Only the ratios of the speeds matter."""

    world: int  # ranks
    node: int  # ranks of each node
    flops: float  # of a rank's matmuls, per second
    memory: float  # bytes/s of a rank's memory
    near: float  # bytes/s that a rank sends within its node
    far: float  # bytes/s that a rank sends to other nodes
    overlaps: bool  # a rank sends behind its matmuls

    @classmethod
    def of(cls, device_type: str, world: int, node: int) -> "Machine":
        """Round numbers: a datacenter GPU with NVLink and one 200 Gb/s card each, or a CPU core with gloo."""
        if device_type == "cuda":
            return cls(world, node, flops=4e14, memory=2e12, near=2e11, far=2.5e10, overlaps=True)
        return cls(world, node, flops=1e11, memory=5e9, near=1e9, far=1e9, overlaps=False)


@dataclass(frozen=True)
class Estimate:
    """One step of a rank, with one size of the vocab axis."""

    ranks: int  # p, those that share a copy
    seconds: float  # of the head, the lookup and the rows' optimizer
    sent: float  # bytes
    held: float  # bytes


@dataclass(frozen=True)
class Parallel:
    """The size of the vocab axis that was chosen."""

    ranks: int
    why: str  # for the user; "" if there is nothing to say


def choose_parallel(asked: str, work: Workload, machine: Machine) -> Parallel:
    """Chooses, if `asked` is "auto", the size that holds least among those about as fast as the fastest.

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
    """What the matrix moves in a step, with p ranks to a copy and each micro-batch's loss in that many chunks.

    lookup: rows that a rank sends to others for their lookups of a step, and that it gets; None: as in text.
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
        "v · D · 4 a matrix",
        axis="dp",
        ranks=world // p,
    )
    return moved


def estimate(p: int, work: Workload, machine: Machine) -> Estimate:
    """One step with p ranks to a copy."""
    fits = p <= machine.node and machine.node % p == 0  # or a group lies on several nodes
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
    """The same step with the rows split over the whole world and gathered for each micro-batch, as FSDP does."""
    numbers = work.rows * work.width * work.matrices
    others = (machine.world - 1) / machine.world
    sent = work.micro_batches * others * numbers * (work.itemsize + GRADIENT)
    rows = numbers * (update_bytes(work.state) / machine.world + TOUCH * work.micro_batches) / machine.memory
    link = machine.near if machine.world <= machine.node else machine.far
    held = numbers * (work.held / machine.world + work.itemsize + GRADIENT)
    return Estimate(machine.world, _matmuls(work, machine) + sent / link + rows, sent, held)


def update_bytes(state: float) -> float:
    """Bytes per number that an optimizer's step moves: it reads and writes weight and state, and reads the gradient."""
    return 2 * (WEIGHT + state) + GRADIENT


def _matmuls(work: Workload, machine: Machine) -> float:
    return work.micro_batches * 6 * work.tokens * work.rows * work.width / machine.flops


def _table(sizes: list[Estimate], gathered: Estimate, chosen: Estimate) -> str:
    """A line each; estimates, good for comparing them."""
    lines = ["  ranks to a copy    head, ms a step    sent, MiB a step    held, MiB"]
    for size in [*sizes, gathered]:
        name = "FSDP's gather" if size is gathered else f"{size.ranks:,}"
        seconds, sent, held = _round(size.seconds * 1e3), _round(size.sent / 2**20), _round(size.held / 2**20)
        lines.append(f"  {name:>15}{seconds:>19}{sent:>20}{held:>13}" + " <" * (size is chosen))
    return "\n".join(lines)


def _round(value: float) -> str:
    """Two digits are all that an estimate is worth."""
    digits = max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 2)}f}"

"""Which rows of a split tensor are mine: the only place with shard arithmetic."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

INIT_BLOCK = 128  # rows drawn from one generator; part of the model's definition, like its seed


@dataclass(frozen=True)
class RowShard:
    """One rank's contiguous range of rows of a tensor with `padded_size` rows.

    Each rank holds ceil(padded_size / world) of them; the last shards may be shorter, or empty. This is also how
    `DTensor`, FSDP2 and `torch.chunk` split a dim.
    """

    rank: int
    world: int
    padded_size: int

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} must be in [0, world={self.world})")

    @property
    def rows_per_rank(self) -> int:
        """Rows of every shard but the last ones."""
        return -(-self.padded_size // self.world)

    @property
    def edges(self) -> list[int]:
        """First row of each shard, counted in the whole tensor, and the end of the last: world + 1 numbers."""
        return [min(rank * self.rows_per_rank, self.padded_size) for rank in range(self.world + 1)]

    @property
    def start(self) -> int:
        """First row of this shard."""
        return min(self.rank * self.rows_per_rank, self.padded_size)

    @property
    def stop(self) -> int:
        return min(self.start + self.rows_per_rank, self.padded_size)

    @property
    def rows(self) -> int:
        """v: the rows of this shard, padding included."""
        return self.stop - self.start


@dataclass(frozen=True)
class VocabShard(RowShard):
    """One rank's vocabulary rows.

    The matrix has `padded_size` rows: `vocab_size` rounded up to `multiple`, so its shape belongs to the model and is
    the same for every split. Rows at or above `vocab_size` are padding: zero, without logit, without gradient.
    """

    vocab_size: int

    @classmethod
    def of(cls, rank: int, world: int, vocab_size: int, multiple: int = 128) -> "VocabShard":
        """The shard of `rank` among `world`. Raises ValueError on a rank, size or multiple out of range."""
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1")
        if multiple < 1:
            raise ValueError(f"multiple={multiple} must be at least 1")
        return cls(rank, world, -(-vocab_size // multiple) * multiple, vocab_size)

    @property
    def valid_rows(self) -> int:
        """The rows of this shard that are not padding; they come first."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def holds(self, ids: Tensor) -> Tensor:
        """True where this shard owns the id. Padding rows and negative ids belong to nobody."""
        return (ids >= self.start) & (ids < self.start + self.valid_rows)

    def local(self, ids: Tensor) -> Tensor:
        """Ids counted from this shard's first row; only meaningful where `holds(ids)`."""
        return ids - self.start

    def initial_rows(self, name: str, seed: int, width: int, std: float) -> Tensor:
        """Normal rows of this shard [v, width] in fp32, padding zero; the same rows for any split."""
        rows_vD = seeded_normal(name, seed, self.start, self.stop, width, std)
        rows_vD[self.valid_rows :] = 0
        return rows_vD


def seeded_normal(name: str, seed: int, start: int, stop: int, width: int, std: float) -> Tensor:
    """Rows [start, stop) of the normal matrix `name` of any height, [stop - start, width], fp32, on the CPU.

    Every block of `INIT_BLOCK` rows has a generator of its own, seeded by (seed, name, block). So any rank
    draws just its rows, and every split yields the same matrix bit for bit.
    """
    out = torch.empty(stop - start, width, dtype=torch.float32)
    for block in range(start // INIT_BLOCK, -(-stop // INIT_BLOCK)):
        generator = torch.Generator().manual_seed(stable_seed(seed, name, block))
        rows = torch.empty(INIT_BLOCK, width, dtype=torch.float32).normal_(0.0, std, generator=generator)
        first = block * INIT_BLOCK
        low, high = max(start, first), min(stop, first + INIT_BLOCK)
        out[low - start : high - start] = rows[low - first : high - first]
    return out


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text: the same in every process, unlike `hash`."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

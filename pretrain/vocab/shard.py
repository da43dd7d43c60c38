"""Ownership of rows: which rows of a sharded tensor are this rank's. The only module with shard arithmetic."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

INIT_BLOCK = 128  # rows drawn from one generator; part of the model's definition, like its seed


@dataclass(frozen=True)
class RowShard:
    """One rank's contiguous range of rows of a tensor with `padded_size` rows.

    Each rank holds ceil(padded_size / world) rows; the last shards may be shorter, or empty. `DTensor`, FSDP2 and
    `torch.chunk` cut a dim in the same way.
    """

    rank: int
    world: int
    padded_size: int

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} must be in [0, world={self.world})")

    @property
    def rows_per_rank(self) -> int:
        """Rows of every shard except the last ones, which may have fewer."""
        return -(-self.padded_size // self.world)

    @property
    def edges(self) -> list[int]:
        """First row of each shard in the whole tensor, and the end of the last shard: world + 1 numbers."""
        return [min(rank * self.rows_per_rank, self.padded_size) for rank in range(self.world + 1)]

    @property
    def start(self) -> int:
        """First row of this shard."""
        return min(self.rank * self.rows_per_rank, self.padded_size)

    @property
    def stop(self) -> int:
        """End of this shard: its last row + 1."""
        return min(self.start + self.rows_per_rank, self.padded_size)

    @property
    def rows(self) -> int:
        """v: the number of rows of this shard, padding included."""
        return self.stop - self.start


@dataclass(frozen=True)
class VocabShard(RowShard):
    """One rank's vocabulary rows.

    The matrix has `padded_size` rows: `vocab_size` rounded up to `multiple`. So its shape belongs to the model, and is
    the same for every number of ranks. Rows at or above `vocab_size` are padding: zero, without logit or gradient.

    >>> shard = VocabShard.of(rank=1, world=4, vocab_size=1000)  # padded to 1,024 rows
    >>> shard.start, shard.stop, shard.rows
    (256, 512, 256)
    >>> shard.edges
    [0, 256, 512, 768, 1024]
    """

    vocab_size: int

    @classmethod
    def of(cls, rank: int, world: int, vocab_size: int, multiple: int = 128) -> "VocabShard":
        """Returns the shard of `rank` among `world` ranks.

        Raises ValueError if rank, vocab_size or multiple is out of range.

        >>> last = VocabShard.of(rank=3, world=4, vocab_size=1000)
        >>> last.rows, last.valid_rows  # 24 rows of padding
        (256, 232)
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1")
        if multiple < 1:
            raise ValueError(f"multiple={multiple} must be at least 1")
        return cls(rank, world, -(-vocab_size // multiple) * multiple, vocab_size)

    @property
    def valid_rows(self) -> int:
        """Number of rows of this shard that are not padding; they come first."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def holds(self, ids: Tensor) -> Tensor:
        """Returns a bool per id: True if this shard owns it. No shard owns padding rows or negative ids.

        >>> VocabShard.of(rank=1, world=4, vocab_size=1000).holds(torch.tensor([255, 256, 511, -100]))
        tensor([False,  True,  True, False])
        """
        return (ids >= self.start) & (ids < self.start + self.valid_rows)

    def local(self, ids: Tensor) -> Tensor:
        """Returns the ids counted from this shard's first row; meaningful only for ids that the shard holds.

        >>> VocabShard.of(rank=1, world=4, vocab_size=1000).local(torch.tensor([256, 300]))
        tensor([ 0, 44])
        """
        return ids - self.start

    def initial_rows(self, name: str, seed: int, width: int, std: float) -> Tensor:
        """Draws this shard's rows [v, width] from a normal distribution, fp32, on the CPU; padding rows are zero.

        The rows depend on name, seed and row number only, so they are the same for any number of ranks.

        >>> whole, half = VocabShard.of(0, 1, vocab_size=1000), VocabShard.of(1, 2, vocab_size=1000)
        >>> rows = whole.initial_rows("embedding.weight", seed=0, width=8, std=0.02)
        >>> torch.equal(rows[512:], half.initial_rows("embedding.weight", seed=0, width=8, std=0.02))
        True
        """
        rows_vD = seeded_normal(name, seed, self.start, self.stop, width, std)
        rows_vD[self.valid_rows :] = 0
        return rows_vD


def seeded_normal(name: str, seed: int, start: int, stop: int, width: int, std: float) -> Tensor:
    """Draws rows [start, stop) of the normal matrix `name`: [stop - start, width], fp32, on the CPU.

    Every block of `INIT_BLOCK` rows has its own generator, seeded by (seed, name, block). So a rank draws only its own
    rows, and any number of ranks builds the same matrix bit for bit.
    """
    out = torch.empty(stop - start, width, dtype=torch.float32)

    def draw(block: int) -> None:
        generator = torch.Generator().manual_seed(stable_seed(seed, name, block))
        rows = torch.empty(INIT_BLOCK, width, dtype=torch.float32).normal_(0.0, std, generator=generator)
        first = block * INIT_BLOCK
        low, high = max(start, first), min(stop, first + INIT_BLOCK)
        out[low - start : high - start] = rows[low - first : high - first]

    blocks = range(start // INIT_BLOCK, -(-stop // INIT_BLOCK))
    if (threads := min(torch.get_num_threads(), len(blocks))) < 2:
        for block in blocks:
            draw(block)
    else:  # torch draws with one thread: a billion numbers would take most of a minute
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(draw, blocks):
                pass
    return out


def stable_seed(*parts: object) -> int:
    """Returns a 63-bit seed made from the parts' text: the same in every process, unlike `hash`."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

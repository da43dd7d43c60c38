"""Cuts the group's tokens into chunks that fit a memory budget, and brings their hidden states, one chunk ahead."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .collectives import Pending, TokenComm
from .kernels.base import Kernels, accurate_dtype
from .shard import RowShard

ROUND = 128  # tokens: matmuls like chunks of whole tiles


def chunk_budget(shard: RowShard, width: int, dtype: torch.dtype, memory_mib: int | None, kernels: Kernels) -> int:
    """How many tokens of all ranks may be in work at once; the same on every rank.

    The kernels' slab goes off the memory, at most half of it. Where nobody gives a budget it grows with the rows'
    gradient: every chunk passes over all of that once, which a chunk of few tokens does not repay.
    """
    if memory_mib is None:
        memory = max(kernels.memory_mib * 2**20, shard.rows_per_rank * width * accurate_dtype(dtype).itemsize // 4)
    else:
        memory = memory_mib * 2**20
    tokens = max(1, max(memory - kernels.slab_bytes, memory // 2) // token_bytes(shard, width, dtype))
    return tokens if tokens < ROUND else tokens // ROUND * ROUND


def token_bytes(shard: RowShard, width: int, dtype: torch.dtype) -> int:
    """Bytes of a token in work: its factors [v] and its hidden states in this and the next chunk, scaled, and the
    matmul's product, in `dtype`; and its gradient, before and after the reduction, accurate.
    """
    return shard.rows_per_rank * dtype.itemsize + width * (4 * dtype.itemsize + 2 * accurate_dtype(dtype).itemsize)


def chunk_size(max_tokens_per_rank: int, ranks: int, budget: int) -> int:
    """Tokens of each rank in a chunk, where ranks bring up to `max_tokens_per_rank`: even chunks of whole tiles."""
    most = max(1, budget // ranks)
    even = -(-max_tokens_per_rank // max(1, -(-max_tokens_per_rank // most)))
    whole = max(1, ROUND // ranks)
    return min(most, -(-even // whole) * whole)


@dataclass(frozen=True)
class Chunk:
    """m tokens of the group in rank order: c of each rank that brings its own, padded where a rank has fewer."""

    mine: slice  # of this rank's tokens; empty where it has run out of them
    hidden_mD: Tensor
    columns: slice  # of what `Chunks.gather` returns

    def of(self, values_pL: Tensor) -> Tensor:
        """[p, longest] -> [m]: this chunk's part of what was gathered."""
        return values_pL[:, self.columns].flatten()


class Chunks:
    """This rank's tokens, in as many chunks of equal size as the rank with the most tokens needs.

    A token may bring several hidden states, [N, ..., D]; its chunks then have them too.
    """

    def __init__(self, traffic: TokenComm, hidden_ND: Tensor, budget: int, max_tokens_per_rank: int | None) -> None:
        self.traffic, self.hidden_ND = traffic, hidden_ND
        N = len(hidden_ND)
        self.max_tokens_per_rank = (
            traffic.max_tokens_per_rank(N, hidden_ND.device) if max_tokens_per_rank is None else max_tokens_per_rank
        )
        if self.max_tokens_per_rank < N:
            raise ValueError(f"max_tokens_per_rank={max_tokens_per_rank} must be at least the {N} tokens of this rank")
        self.size = chunk_size(self.max_tokens_per_rank, traffic.ranks, budget)

    @property
    def tokens(self) -> int:
        """m of the largest chunk."""
        return self.traffic.ranks * min(self.size, self.max_tokens_per_rank)

    def gather(self, values_N: Tensor, fill: float) -> Tensor:
        """[N] -> [p, longest] of all ranks that bring tokens, short ones filled up. One all-gather."""
        return self.traffic.gather(F.pad(values_N, (0, self.max_tokens_per_rank - len(values_N)), value=fill)).wait()

    def __len__(self) -> int:
        return -(-self.max_tokens_per_rank // self.size) if self.max_tokens_per_rank else 0

    def __iter__(self) -> Iterator[Chunk]:
        """The next chunk's hidden states are on their way while this one is in work."""
        arriving = [self._fetch(0)] if len(self) else []
        for i in range(len(self)):
            mine, columns, hidden = arriving.pop()
            if i + 1 < len(self):
                arriving.append(self._fetch(i + 1))
            yield Chunk(mine, hidden.wait().flatten(0, 1), columns)

    def _fetch(self, i: int) -> tuple[slice, slice, Pending]:
        N = len(self.hidden_ND)
        columns = slice(i * self.size, min((i + 1) * self.size, self.max_tokens_per_rank))
        mine = slice(min(columns.start, N), min(columns.stop, N))
        missing = (columns.stop - columns.start) - (mine.stop - mine.start)
        hidden_cD = self.hidden_ND[mine]
        if missing:
            hidden_cD = F.pad(hidden_cD, (0, 0) * (hidden_cD.dim() - 1) + (0, missing))
        return mine, columns, self.traffic.gather(hidden_cD)

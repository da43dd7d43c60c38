"""Chunks of the group's tokens that fit a memory budget; their hidden states are gathered one chunk ahead."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .collectives import Pending, TokenComm
from .kernels.base import Kernels, accurate_dtype
from .shard import RowShard

ROUND = 128  # tokens: matmuls are fastest on whole tiles


def chunk_budget(shard: RowShard, width: int, dtype: torch.dtype, memory_mib: int | None, kernels: Kernels) -> int:
    """Returns how many tokens of all ranks a chunk may have; the same number on every rank.

    The kernels' slab is taken off the memory, but at most half of it. If `memory_mib` is None, the budget grows with
    the rows' gradient: every chunk passes over the whole gradient once, which does not pay for few tokens.
    """
    if memory_mib is None:
        memory = max(kernels.memory_mib * 2**20, shard.rows_per_rank * width * accurate_dtype(dtype).itemsize // 4)
    else:
        memory = memory_mib * 2**20
    tokens = max(1, max(memory - kernels.slab_bytes, memory // 2) // token_bytes(shard, width, dtype))
    return tokens if tokens < ROUND else tokens // ROUND * ROUND


def token_bytes(shard: RowShard, width: int, dtype: torch.dtype) -> int:
    """Returns the bytes that one token of a chunk needs.

    In `dtype`: its unnormalised probabilities [v], its hidden state in this and in the next chunk, the scaled one, and
    the matmul's product. In the accurate dtype: its gradient before and after the reduction.
    """
    return shard.rows_per_rank * dtype.itemsize + width * (4 * dtype.itemsize + 2 * accurate_dtype(dtype).itemsize)


def chunk_size(max_tokens_per_rank: int, ranks: int, budget: int) -> int:
    """Returns the tokens of each rank in a chunk: even chunks of whole tiles, as large as the budget allows."""
    most = max(1, budget // ranks)
    even = -(-max_tokens_per_rank // max(1, -(-max_tokens_per_rank // most)))
    whole = max(1, ROUND // ranks)
    return min(most, -(-even // whole) * whole)


@dataclass(frozen=True)
class Chunk:
    """m tokens of the group in rank order: c of each rank that has its own, padded if a rank has fewer."""

    mine: slice  # this rank's tokens in the chunk; empty if it has no more
    hidden_mD: Tensor
    columns: slice  # the chunk's columns in what `Chunks.gather` returns

    def of(self, values_pL: Tensor) -> Tensor:
        """Returns this chunk's part [m] of what was gathered, [p, max_tokens_per_rank]."""
        return values_pL[:, self.columns].flatten()


class Chunks:
    """Tokens of this rank, cut into as many chunks of equal size as the rank with the most tokens needs.

    A token may have several hidden states, [N, ..., D]; the chunks then have them too.
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
        """Tokens of the largest chunk: m."""
        return self.traffic.ranks * min(self.size, self.max_tokens_per_rank)

    def gather(self, values_N: Tensor, fill: float) -> Tensor:
        """Gathers [N] of all ranks to [p, max_tokens_per_rank]; `fill` stands for missing tokens. One all-gather."""
        return self.traffic.gather(F.pad(values_N, (0, self.max_tokens_per_rank - len(values_N)), value=fill)).wait()

    def __len__(self) -> int:
        return -(-self.max_tokens_per_rank // self.size) if self.max_tokens_per_rank else 0

    def __iter__(self) -> Iterator[Chunk]:
        """Yields the chunks in order. The next chunk's hidden states travel while the caller works on this one."""
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

"""Measures of the logits of hidden states, such as top-k, rank or entropy, while no logit leaves its rank.

Every rank multiplies a chunk of tokens with its own rows and reduces the logits to a few numbers per token; the ranks
exchange these. A chunk is as large as a memory budget allows, so nothing grows with tokens × rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .chunks import Chunk, Chunks
from .collectives import TokenComm, on_host, token_comm
from .kernels.base import accurate_dtype
from .shard import VocabShard
from .softmax import GlobalSoftmax, ShardSoftmax, dot

MEMORY_MIB = 256
TILE_BYTES = 16 * 2**20  # of rows that are converted to the accurate dtype at once


@dataclass(frozen=True)
class Reading:
    """Result of `Readout.read` for S sets of N hidden states, in nats, in the accurate dtype."""

    top_logits: Tensor  # the k largest logits, in descending order [S, N, k]
    top_ids: Tensor  # their ids [S, N, k]; among equal logits the lowest id comes first
    lse: Tensor  # log-sum-exp of the logits [S, N]
    entropy: Tensor  # entropy of the softmax [S, N]
    logits: Tensor  # logits of the J ids that were asked for [S, N, J]; NaN for an id outside [0, V)
    ranks: Tensor  # their ranks [S, N, J]; 1: largest logit, lowest id first among equals; 0 for an id outside [0, V)
    kl_from: Tensor  # KL(reference ‖ set) [S, N, R]
    kl_to: Tensor  # KL(set ‖ reference) [S, N, R]
    mass: Tensor  # probability of the marked rows [S, N]


class Readout:
    """Reads softcap(hidden @ W.T), where the rows of W are split over the ranks of `group`; padding rows are not read.

    tokens="replicated": every rank passes the same hidden states, and gets all results. tokens="distinct": every rank
    passes its own, any number of them, and gets their results. Logits are fp32 (float64 if hidden or the rows are), and
    so are the results. `memory_mib`: about what a chunk's logits, and the hidden states that are gathered for them, may
    need per rank. No gradients. `group=None` means one process.

    >>> rows = torch.eye(4)  # the logits are the hidden states
    >>> readout = Readout(rows, shard=VocabShard.of(rank=0, world=1, vocab_size=4, multiple=1))
    >>> logits, ids = readout.top_k(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), k=2)
    >>> logits.tolist(), ids.tolist()
    ([[3.0, 2.0]], [[1, 3]])
    """

    def __init__(
        self,
        weight_vD: Tensor,
        *,
        shard: VocabShard,
        group: dist.ProcessGroup | None = None,
        softcap: float | None = None,
        tokens: Literal["distinct", "replicated"] = "replicated",
        memory_mib: float = MEMORY_MIB,
    ) -> None:
        """Raises ValueError if the shard is not this rank's shard of the group, or the weight has other rows."""
        if len(weight_vD) != shard.rows:
            raise ValueError(f"weight has {len(weight_vD)} rows, but the shard has {shard.rows}")
        if not memory_mib > 0:
            raise ValueError(f"memory_mib={memory_mib} must be positive")
        self.weight_vD = weight_vD.detach()[: shard.valid_rows]
        self.shard, self.softcap, self.memory_mib = shard, softcap, memory_mib
        self.traffic: TokenComm = token_comm(shard, group, tokens)

    def top_k(self, hidden_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns the k largest logits and their ids, [N, k]; the lowest ids among equal logits.

        Collectives: see `read`.
        """
        read = self.read(hidden_ND[None], k=k)
        return read.top_logits[0], read.top_ids[0]

    def logit(self, hidden_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Returns the logit of one id per position, [N]. Collectives: see `read`."""
        return self.read(hidden_ND[None], ids_NJ=ids_N[:, None]).logits[0, :, 0]

    def rank(self, hidden_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Returns the rank of one id per position, [N] int64: 1 for the largest logit. Collectives: see `read`."""
        return self.read(hidden_ND[None], ids_NJ=ids_N[:, None]).ranks[0, :, 0]

    def log_sum_exp(self, hidden_ND: Tensor) -> Tensor:
        """Returns the log-sum-exp of the logits, [N]. Collectives: see `read`."""
        return self.read(hidden_ND[None]).lse[0]

    def entropy(self, hidden_ND: Tensor) -> Tensor:
        """Returns the entropy of the softmax, [N]. Collectives: see `read`."""
        return self.read(hidden_ND[None]).entropy[0]

    def kl(self, hidden_a_ND: Tensor, hidden_b_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns KL(a ‖ b) and KL(b ‖ a), [N] each. Collectives: see `read`."""
        read = self.read(hidden_b_ND[None], reference_RND=hidden_a_ND[None])
        return read.kl_from[0, :, 0], read.kl_to[0, :, 0]

    def masked_mass(self, hidden_ND: Tensor, mask_v: Tensor) -> Tensor:
        """Returns the probability of the rows that `mask_v` marks, [N]. Collectives: see `read`."""
        return self.read(hidden_ND[None], mask_v=mask_v).mass[0]

    @torch.no_grad()
    def read(
        self,
        hidden_SND: Tensor,
        *,
        k: int = 0,
        ids_NJ: Tensor | None = None,
        reference_RND: Tensor | None = None,
        mask_v: Tensor | None = None,
    ) -> Reading:
        """Computes all measures in one pass: one matmul of every set and every reference with this rank's rows.

        `mask_v`: one bool for each of this rank's rows, padding included. Without it `mass` is 0.
        Collectives per chunk and set: a gather of the J logits, and one of 4 + 2·R + J + 2·k numbers per token; per
        chunk: one of the references' 2·R numbers. "distinct" also gathers the hidden states, the ids, and the number of
        tokens. Raises ValueError if k is outside [0, V], or shapes do not match.
        """
        S, N, _ = hidden_SND.shape
        references = hidden_SND[:0] if reference_RND is None else reference_RND
        if ids_NJ is None:
            ids_NJ = torch.empty(N, 0, dtype=torch.int64, device=hidden_SND.device)
        self._check(hidden_SND, references, ids_NJ, mask_v, k)
        J, R = ids_NJ.shape[1], len(references)
        accurate = self._accurate(hidden_SND)
        sizes = {"top_logits": (k,), "top_ids": (k,), "lse": (), "entropy": (), "logits": (J,), "ranks": (J,)}
        sizes |= {"kl_from": (R,), "kl_to": (R,), "mass": ()}
        whole_numbers = ("top_ids", "ranks")
        out = {
            name: hidden_SND.new_empty((S, N, *size), dtype=torch.int64 if name in whole_numbers else accurate)
            for name, size in sizes.items()
        }
        for chunk, ids_mJ, reference_mRD in self._chunks(hidden_SND, ids_NJ, references):
            sets = [ShardSoftmax.of(self._logits(hidden_mD)) for hidden_mD in reference_mRD.unbind(1)]
            wholes = self._wholes(sets)
            for s, hidden_mD in enumerate(chunk.hidden_mD.unbind(1)):
                merged = self._read(self._logits(hidden_mD), ids_mJ, sets, wholes, mask_v, k)
                for name, value_m in merged.items():
                    mine = self.traffic.mine(value_m)[: chunk.mine.stop - chunk.mine.start]
                    out[name][s, chunk.mine] = mine.to(out[name].dtype)
        return Reading(**out)

    def _chunks(
        self, hidden_SND: Tensor, ids_NJ: Tensor, reference_RND: Tensor
    ) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        """Yields chunks of [m, S, D], with the ids [m, J] and the references [m, R, D] of their tokens."""
        states = len(hidden_SND) + len(reference_RND)
        slabs = 6 + 2 * len(reference_RND)  # logits, what is computed from them, and the order of the largest
        token_bytes = slabs * self.shard.rows_per_rank * self._accurate(hidden_SND).itemsize
        if self.traffic.ranks > 1:  # the hidden states of this chunk and the next are gathered
            token_bytes += 2 * states * hidden_SND.shape[-1] * hidden_SND.itemsize
        budget = max(1, int(self.memory_mib * 2**20 / token_bytes))
        chunks = Chunks(self.traffic, hidden_SND.transpose(0, 1), budget, None)
        ids = [chunks.gather(ids_N, -1) for ids_N in ids_NJ.unbind(1)]
        references: Iterator[Tensor] = repeat(hidden_SND.new_empty(0, 0, hidden_SND.shape[-1]))
        if len(reference_RND):
            others = Chunks(self.traffic, reference_RND.transpose(0, 1), budget, chunks.max_tokens_per_rank)
            references = (reference.hidden_mD for reference in others)
        for chunk, reference_mRD in zip(chunks, references, strict=False):
            of_chunk = [chunk.of(ids_pL) for ids_pL in ids]
            ids_mJ = torch.stack(of_chunk, 1) if ids else ids_NJ.new_empty(len(chunk.hidden_mD), 0)
            yield chunk, ids_mJ, reference_mRD

    def _wholes(self, sets: list[ShardSoftmax]) -> list[GlobalSoftmax]:
        if not sets:
            return []
        stacked_pkm = self._exchange([statistic for own in sets for statistic in (own.max_m, own.sum_m)])
        return [GlobalSoftmax.of(*stacked_pkm[:, 2 * r : 2 * r + 2].unbind(1)) for r in range(len(sets))]

    def _read(
        self,
        logits_mv: Tensor,
        ids_mJ: Tensor,
        references: list[ShardSoftmax],
        wholes: list[GlobalSoftmax],
        mask_v: Tensor | None,
        k: int,
    ) -> dict[str, Tensor]:
        """Measures one set of one chunk: the fields of `Reading`, [m, ...]."""
        logits_mJ = self._logits_of(logits_mv, ids_mJ)
        counts = [self._before(logits_mv, logit_m, ids_m) for logit_m, ids_m in zip(logits_mJ.T, ids_mJ.T, strict=True)]
        top_km, top_ids_km = self._top(logits_mv, k)
        own = ShardSoftmax.of(logits_mv)
        rows = slice(None) if mask_v is None else mask_v[: len(self.weight_vD)]
        statistics = [own.max_m, own.sum_m, dot(own.exp_mv, own.shifted_mv)]
        statistics.append(torch.zeros_like(own.sum_m) if mask_v is None else own.exp_mv[:, rows].sum(1))
        for reference in references:
            distance_mv = reference.shifted_mv - own.shifted_mv
            statistics += [dot(reference.exp_mv, distance_mv), -dot(own.exp_mv, distance_mv)]
        stacked = self._exchange([*statistics, *counts, *top_km, *top_ids_km.to(own.max_m.dtype)])
        parts = iter(stacked.unbind(1))
        whole = GlobalSoftmax.of(next(parts), next(parts))
        entropy_m = whole.entropy(next(parts))
        mass_m = (whole.weight_pm * next(parts)).sum(0)
        pairs = [
            (reference_whole.kl(whole, next(parts)), whole.kl(reference_whole, next(parts)))
            for reference_whole in wholes
        ]
        ranks = [1 + next(parts).sum(0) for _ in counts]
        known_mJ = (ids_mJ >= 0) & (ids_mJ < self.shard.vocab_size)
        nothing = top_km.new_empty(len(own.max_m), 0)
        top_mK, top_ids_mK = nothing, nothing
        if k:
            all_mK, all_ids_mK = (part.flatten(0, 1).T for part in (stacked[:, -2 * k : -k], stacked[:, -k:]))
            order_mK = all_ids_mK.argsort(dim=1)
            all_mK, all_ids_mK = all_mK.gather(1, order_mK), all_ids_mK.gather(1, order_mK)
            order_mk = all_mK.sort(dim=1, descending=True, stable=True).indices[:, :k]
            top_mK, top_ids_mK = all_mK.gather(1, order_mk), all_ids_mK.gather(1, order_mk)
        return {
            "top_logits": top_mK,
            "top_ids": top_ids_mK,
            "lse": whole.lse_m,
            "entropy": entropy_m,
            "logits": torch.where(known_mJ, logits_mJ, math.nan),
            "ranks": torch.where(known_mJ, torch.stack(ranks, 1), 0) if ranks else nothing,
            "kl_from": torch.stack([kl for kl, _ in pairs], 1) if pairs else nothing,
            "kl_to": torch.stack([kl for _, kl in pairs], 1) if pairs else nothing,
            "mass": mass_m,
        }

    def _logits(self, hidden_mD: Tensor) -> Tensor:
        """Returns the logits [m, v] in the accurate dtype."""
        return logits_in(self._accurate(hidden_mD), hidden_mD, self.weight_vD, self.softcap)

    def _logits_of(self, logits_mv: Tensor, ids_mJ: Tensor) -> Tensor:
        """Returns the logits of the ids, [m, J], which their owners send."""
        if not ids_mJ.shape[1]:
            return logits_mv.new_empty(ids_mJ.shape)
        held_mJ = self.shard.holds(ids_mJ)
        mine_mJ = torch.zeros_like(held_mJ, dtype=logits_mv.dtype)
        if len(self.weight_vD):
            local_mJ = torch.where(held_mJ, self.shard.local(ids_mJ), 0)
            mine_mJ = torch.where(held_mJ, logits_mv.gather(1, local_mJ), 0.0)
        return self._exchange(list(mine_mJ.T)).sum(0).T

    def _before(self, logits_mv: Tensor, logit_m: Tensor, ids_m: Tensor) -> Tensor:
        """Counts this rank's rows that come before the given ids, whose logits are given, [m]."""
        equal_mv = (logits_mv == logit_m[:, None]) & (self._ids_v < ids_m[:, None])
        return ((logits_mv > logit_m[:, None]) | equal_mv).sum(1).to(logits_mv.dtype)

    def _top(self, logits_mv: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns the k largest logits of this rank's rows in descending order, and their ids, [k, m] each.

        Among equal logits the lowest id comes first. If the rank has fewer rows, -inf and id V fill up. NaN, from a
        model that has diverged, counts as the lowest.
        """
        m, v = logits_mv.shape
        values_mk = logits_mv.new_full((m, k), -math.inf)
        ids_mk = torch.full((m, k), self.shard.vocab_size, device=logits_mv.device)
        n = min(k, v)
        if n:
            logits_mv = logits_mv.nan_to_num(-math.inf, math.inf, -math.inf)
            edge_m1 = logits_mv.topk(n, dim=1).values[:, -1:]  # topk takes any of several equal ones
            above_mv, equal_mv = logits_mv > edge_m1, logits_mv == edge_m1
            missing_m1 = n - above_mv.sum(1, keepdim=True)
            kept_mv = above_mv | (equal_mv & (equal_mv.cumsum(1, dtype=torch.int32) <= missing_m1))
            on_host(missing_m1)  # nonzero waits for the device, too: here the supervisor recognises the wait
            local_mn = kept_mv.nonzero()[:, 1].view(m, n)
            kept_mn, order_mn = logits_mv.gather(1, local_mn).sort(dim=1, descending=True, stable=True)
            values_mk[:, :n], ids_mk[:, :n] = kept_mn, local_mn.gather(1, order_mn) + self.shard.start
        return values_mk.T, ids_mk.T

    @cached_property
    def _ids_v(self) -> Tensor:
        return torch.arange(self.shard.start, self.shard.start + len(self.weight_vD), device=self.weight_vD.device)

    def _accurate(self, hidden: Tensor) -> torch.dtype:
        return accurate_dtype(torch.promote_types(hidden.dtype, self.weight_vD.dtype))

    def _exchange(self, statistics: list[Tensor]) -> Tensor:
        """Gathers the statistics of all shards: [p, k, m]."""
        return self.traffic.stack(torch.stack(statistics)).wait()

    def _check(self, hidden_SND: Tensor, reference_RND: Tensor, ids_NJ: Tensor, mask_v: Tensor | None, k: int) -> None:
        N, D = hidden_SND.shape[1:]
        if self.weight_vD.shape[1] != D or reference_RND.shape[1:] != (N, D) or len(ids_NJ) != N:
            raise ValueError(
                f"hidden {list(hidden_SND.shape)}, references {list(reference_RND.shape)} and ids {list(ids_NJ.shape)}"
                f" must be of the same positions, and as wide as the rows: {self.weight_vD.shape[1]}"
            )
        if not 0 <= k <= self.shard.vocab_size:
            raise ValueError(f"k={k} must be in [0, {self.shard.vocab_size}]")
        if mask_v is not None and mask_v.shape != (self.shard.rows,):
            raise ValueError(f"mask has {list(mask_v.shape)} marks, but the shard has {self.shard.rows} rows")


def logits_in(dtype: torch.dtype, hidden_mD: Tensor, rows_vD: Tensor, softcap: float | None) -> Tensor:
    """Returns the logits [m, v] in `dtype`. Rows of another dtype are converted a few at a time."""
    hidden_mD = hidden_mD.to(dtype)
    if rows_vD.dtype == dtype:
        logits_mv = hidden_mD @ rows_vD.T
    else:
        logits_mv = hidden_mD.new_empty(len(hidden_mD), len(rows_vD))
        height = max(1, TILE_BYTES // (dtype.itemsize * rows_vD.shape[1]))
        for start in range(0, len(rows_vD), height):
            tile = slice(start, start + height)
            logits_mv[:, tile] = hidden_mD @ rows_vD[tile].to(dtype).T
    return logits_mv if softcap is None else logits_mv.div_(softcap).tanh_().mul_(softcap)

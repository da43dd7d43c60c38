"""Lookup of ids in a matrix split by vocabulary rows, for ranks with different tokens.

A rank needs only the distinct ids of its tokens, and each has one owner. So only distinct rows cross the ranks: the row
in forward, its summed gradient in backward. Who sends what to whom follows from the ids alone. A loader that knows
every rank's tokens plans it ahead of time on the host; then no id crosses, and no device waits. If ids hardly repeat,
or one rank owns most of them, this would move more than gather + reduce-scatter of every token's hidden state, as in
Megatron-LM (arXiv:1909.08053); then the plan is made for these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Protocol, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .collectives import all_gather, all_to_all, check_group, on_host, reduce_scatter, token_comm
from .kernels.base import accurate_dtype
from .shard import VocabShard


@dataclass(frozen=True)
class LookupTraffic:
    """Traffic of lookups between the ranks of a group: both directions, summed over ranks, in bytes per column."""

    moved: int  # by the plan
    gathered: int  # what gather + reduce-scatter of the hidden states would move
    sent_p: tuple[int, ...]  # distinct rows that each owner sends to others

    def __add__(self, other: "LookupTraffic") -> "LookupTraffic":
        sent_p = tuple(mine + theirs for mine, theirs in zip(self.sent_p, other.sent_p, strict=True))
        return LookupTraffic(self.moved + other.moved, self.gathered + other.gathered, sent_p)

    @property
    def saved(self) -> float:
        """Share of the bytes of gather + reduce-scatter that is not moved."""
        return 1 - self.moved / self.gathered if self.gathered else 0.0

    @property
    def balance(self) -> float:
        """Rows of the busiest owner as a multiple of the mean: 1 is even; p means that one rank sends all."""
        return max(self.sent_p) * len(self.sent_p) / max(1, sum(self.sent_p))


class LookupPlan(Protocol):
    """One rank's part in one lookup of N ids. All ranks of the group have a plan of the same kind."""

    @property
    def traffic(self) -> LookupTraffic: ...

    def rows(self, weight_vD: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Tensor:
        """Returns the rows of this rank's ids, [N, D] in `dtype`. One collective."""
        ...

    def add_gradient(self, dhidden_ND: Tensor, into: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        """Adds the gradient of all ranks' hidden states to this rank's rows in each buffer [v, D] of `into`.

        The buffers have one dtype. The order of the sum is fixed. One collective.
        """
        ...

    def each(self, move: Callable[[Tensor], Tensor]) -> Self:
        """Returns the same plan with `move` applied to its tensors."""
        ...

    def to(self, device: torch.device) -> Self: ...

    def pin_memory(self) -> Self: ...


class _Tensors:
    """Base of dataclasses that move their tensors, and those of the dataclasses in their fields."""

    def each(self, move: Callable[[Tensor], Tensor]) -> Self:
        moved: dict[str, object] = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = move(value)
            elif isinstance(value, _Tensors):
                moved[item.name] = value.each(move)
        return replace(self, **moved)  # type: ignore[type-var]

    def to(self, device: torch.device) -> Self:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self.each(Tensor.pin_memory)


@dataclass(frozen=True)
class Segments(_Tensors):
    """N values grouped by the U rows to which they belong."""

    places_N: Tensor  # the row of each value
    order_N: Tensor  # the values sorted by row, in their own order within a row
    starts_U: Tensor  # the position in `order_N` of each row's first value

    @classmethod
    def of(cls, places_N: Tensor, rows: int) -> "Segments":
        """Groups values by `places_N`. Every row must have at least one value."""
        sorted_N, order_N = places_N.sort(stable=True)
        return cls(places_N, order_N, torch.searchsorted(sorted_N, torch.arange(rows, device=places_N.device)))

    def sum(self, values_ND: Tensor) -> Tensor:
        """Returns the sum of each row's values, [U, D], added one after the other in their own order, on any device.

        The forward of an embedding bag does this, one thread per column. On CUDA, `embedding_dense_backward` has a race
        from 1,025 to 3,072 values (pytorch PR #187687), and `index_add_` has no fixed order.
        """
        return F.embedding_bag(self.order_N, values_ND, self.starts_U, mode="sum")


@dataclass(frozen=True)
class DistinctRows(_Tensors):
    """Plan of an all-to-all of the distinct rows, and of their summed gradients in fp32 in backward."""

    traffic: LookupTraffic
    send_rows: Tensor  # local rows that the ranks need, [S], grouped by receiver
    send_counts: list[int]  # rows for each receiver
    receive_counts: list[int]  # distinct rows from each owner, U in all, in the order of their ids
    mine: Segments  # this rank's N ids, grouped by these U rows

    def rows(self, weight_vD: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Tensor:
        sent_SD = weight_vD[self.send_rows].to(dtype)
        return all_to_all(sent_SD, self.send_counts, self.receive_counts, group)[self.mine.places_N]

    def add_gradient(self, dhidden_ND: Tensor, into: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        dreceived_UD = self.mine.sum(dhidden_ND.to(into[0].dtype))
        dsent_SD = all_to_all(dreceived_UD, self.receive_counts, self.send_counts, group)
        # one rank after the other: a rank's rows are distinct, so the order of the sum is fixed
        for rows, drows in zip(self.send_rows.split(self.send_counts), dsent_SD.split(self.send_counts), strict=True):
            for dweight_vD in into:
                dweight_vD.index_add_(0, rows, drows)


@dataclass(frozen=True)
class GatheredTokens(_Tensors):
    """Plan of a reduce-scatter of every token's hidden state, and of an all-gather of their gradients in backward."""

    traffic: LookupTraffic
    tokens: int  # N, the same on each rank
    owned_K: Tensor  # positions, among the group's p·N ids, of those that this rank owns
    rows_U: Tensor  # the distinct local rows of these ids
    named: Segments  # the K ids, grouped by these U rows

    def rows(self, weight_vD: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Tensor:
        parts_pND = weight_vD.new_zeros(len(self.traffic.sent_p), self.tokens, weight_vD.shape[1], dtype=dtype)
        parts_pND.flatten(0, 1)[self.owned_K] = weight_vD[self.rows_U].to(dtype)[self.named.places_N]
        return reduce_scatter(parts_pND, group)  # one of the p is not zero: exact in any dtype

    def add_gradient(self, dhidden_ND: Tensor, into: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        downed_KD = all_gather(dhidden_ND.contiguous(), group).flatten(0, 1)[self.owned_K]
        drows_UD = self.named.sum(downed_KD.to(into[0].dtype))
        for dweight_vD in into:
            dweight_vD.index_add_(0, self.rows_U, drows_UD)


def plan_lookup(ids_pN: list[Tensor], shard: VocabShard, dtype: torch.dtype) -> LookupPlan:
    """Plans the lookup of `shard.rank` from the ids of all ranks, in rank order, for hidden states of `dtype`. Local.

    The plan is of the kind that moves fewer bytes at the rank that sends or receives the most.
    Raises ValueError if an id is outside [0, vocab_size).

    >>> ids = [torch.tensor([1, 1, 9]), torch.tensor([1, 2, 3])]  # of two ranks; rank 0 owns the ids below 8
    >>> plan = plan_lookup(ids, VocabShard.of(rank=0, world=2, vocab_size=16, multiple=1), torch.float32)
    >>> plan.traffic.sent_p  # rank 0 sends rows 1, 2 and 3 to rank 1, which sends row 9
    (3, 1)
    """
    edges = torch.tensor(shard.edges, device=ids_pN[0].device)
    distinct_pU = [ids_N.unique() for ids_N in ids_pN]  # sorted, and so grouped by owner
    for ids_U in distinct_pU:
        if len(ids_U) and not 0 <= int(ids_U[0]) <= int(ids_U[-1]) < shard.vocab_size:
            low, high = int(ids_U[0]), int(ids_U[-1])
            raise ValueError(f"ids reach from {low} to {high}, outside [0, vocab_size={shard.vocab_size})")
    edges_pq = torch.stack([torch.searchsorted(ids_U, edges) for ids_U in distinct_pU]).tolist()
    wanted_pp = [[stop - start for start, stop in pairwise(row)] for row in edges_pq]
    traffic, gather = _weigh(wanted_pp, [len(ids_N) for ids_N in ids_pN], dtype)
    me = shard.rank
    if gather:
        ids_M = torch.cat(ids_pN)
        owned_K = shard.holds(ids_M).nonzero().squeeze(1)
        rows_U, places_K = shard.local(ids_M[owned_K]).unique(return_inverse=True)
        return GatheredTokens(traffic, len(ids_pN[me]), owned_K, rows_U, Segments.of(places_K, len(rows_U)))
    sends = [ids_U[row[me] : row[me + 1]] for ids_U, row in zip(distinct_pU, edges_pq, strict=True)]
    mine = Segments.of(torch.searchsorted(distinct_pU[me], ids_pN[me]), len(distinct_pU[me]))
    return DistinctRows(traffic, shard.local(torch.cat(sends)), [len(ids) for ids in sends], wanted_pp[me], mine)


def _weigh(wanted_pp: list[list[int]], tokens_p: list[int], dtype: torch.dtype) -> tuple[LookupTraffic, bool]:
    """Returns the traffic, and True if gathering moves less. wanted[r][o]: distinct rows of owner o for rank r."""
    ranks = range(len(wanted_pp))
    out, back = dtype.itemsize, accurate_dtype(dtype).itemsize
    sent_p = tuple(sum(wanted_pp[r][o] for r in ranks if r != o) for o in ranks)
    received_p = [sum(wanted_pp[r][o] for o in ranks if o != r) for r in ranks]
    others = len(ranks) - 1
    gathered = 2 * out * others * sum(tokens_p)
    gather = len(set(tokens_p)) == 1 and max(*sent_p, *received_p) * (out + back) > 2 * out * others * tokens_p[0]
    return LookupTraffic(gathered if gather else sum(sent_p) * (out + back), gathered, sent_p), gather


def vocab_parallel_lookup(
    ids_N: Tensor,
    weight_vD: Tensor,
    *,
    shard: VocabShard,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    plan: LookupPlan | None = None,
    max_tokens_per_rank: int | None = None,
    main_grad: Callable[[], Sequence[Tensor]] | None = None,
) -> Tensor:
    """Looks this rank's ids up in the split matrix; returns hidden [N, D] in `dtype` (default: the weight's).

    The gradient of the rows is summed in fp32 (float64 if the weight is) over the ids of the whole group. It reaches
    `weight_vD` in its dtype. With `main_grad`, backward adds it to the buffers [v, D] of the accurate dtype which
    `main_grad` returns, and makes no other buffer of their size.

    `plan` must have been made for these ids. Its collectives are the only ones. Without a plan the ids are all-gathered
    first, which waits for the device; before that, an all-reduce finds the largest number of ids per rank, unless
    `max_tokens_per_rank` gives it.

    Raises ValueError if the shard is not this rank's, if `max_tokens_per_rank` is too small, and as `plan_lookup` does
    if it makes the plan.

    >>> rows = torch.arange(8.0).reshape(4, 2).requires_grad_()
    >>> hidden = vocab_parallel_lookup(torch.tensor([3, 0, 3]), rows, shard=VocabShard.of(0, 1, 4, multiple=1))
    >>> hidden.tolist()
    [[6.0, 7.0], [0.0, 1.0], [6.0, 7.0]]
    >>> hidden.sum().backward()
    >>> rows.grad[:, 0].tolist()  # row 3 was used twice
    [1.0, 0.0, 0.0, 2.0]
    """
    check_group(shard, group)
    dtype = dtype or weight_vD.dtype
    if plan is None:
        plan = plan_lookup(_all_ids(ids_N, max_tokens_per_rank, shard, group), shard, dtype).to(ids_N.device)
    hidden_ND: Tensor = _Lookup.apply(weight_vD, plan, group, dtype, main_grad)
    return hidden_ND


def _all_ids(ids_N: Tensor, most: int | None, shard: VocabShard, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Returns the ids of each rank, in host memory. most: the largest number of ids per rank; None: an all-reduce."""
    if most is None:
        most = token_comm(shard, group, "distinct").max_tokens_per_rank(len(ids_N), ids_N.device)
    if most < len(ids_N):
        raise ValueError(f"max_tokens_per_rank={most} must be at least the {len(ids_N)} ids of this rank")
    nothing = torch.iinfo(ids_N.dtype).min
    padded_N = F.pad(ids_N, (0, most - len(ids_N)), value=nothing)
    return [mine[mine != nothing] for mine in on_host(all_gather(padded_N, group))]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_vD, plan, group, dtype, main_grad):  # type: ignore[no-untyped-def]
        ctx.plan, ctx.group, ctx.like, ctx.main_grad = plan, group, weight_vD.detach(), main_grad
        return plan.rows(weight_vD, dtype, group)

    @staticmethod
    def backward(ctx, dhidden_ND):  # type: ignore[no-untyped-def]
        if ctx.main_grad is not None:
            ctx.plan.add_gradient(dhidden_ND, ctx.main_grad(), ctx.group)
            return (None,) * 5
        dweight_vD = torch.zeros_like(ctx.like, dtype=accurate_dtype(ctx.like.dtype))
        ctx.plan.add_gradient(dhidden_ND, [dweight_vD], ctx.group)
        return dweight_vD.to(ctx.like.dtype), None, None, None, None

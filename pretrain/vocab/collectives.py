"""Collectives of the vocabulary group, and how tokens travel between its ranks."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .shard import VocabShard

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def on_host(tensor: Tensor) -> Tensor:
    """Returns the tensor in host memory. On a GPU it waits for the device, and so for every collective before it.

    Every host read of a device tensor on the training path goes through this function: the launcher's supervisor knows
    its frame, and does not blame a rank that hangs here.
    """
    return tensor.cpu()


def check_group(shard: VocabShard, group: dist.ProcessGroup | None) -> None:
    """Raises ValueError if the shard is not this rank's shard of the group; without a group the world is 1."""
    if group is None:
        if shard.world != 1:
            raise ValueError(f"a shard of world={shard.world} needs its process group")
    elif (shard.rank, shard.world) != (dist.get_rank(group), dist.get_world_size(group)):
        raise ValueError(f"shard {shard.rank} of {shard.world} does not fit this rank of its group")


def all_gather(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gathers [...] of every rank to [p, ...], in rank order. All ranks must pass the same shape.

    Without a group p = 1, and nothing moves.
    """
    if group is None:
        return mine.unsqueeze(0)
    world = dist.get_world_size(group)
    flat = mine.new_empty(world * mine.numel())
    _all_gather(flat, mine.reshape(-1), group=group)
    return flat.view(world, *mine.shape)


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Reduces [p, ...] to [...]: the sum over the ranks of the parts that are for this rank."""
    if group is None:
        return parts.squeeze(0)
    mine = parts.new_empty(parts.shape[1:])
    _reduce_scatter(mine.view(-1), parts.reshape(-1), group=group)
    return mine


def all_to_all(parts: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Exchanges [Σsend, ...] for [Σreceive, ...]: the first send[0] rows go to rank 0, and so on.

    The rows that arrive are in rank order.
    """
    if group is None:
        return parts
    out = parts.new_empty(sum(receive), *parts.shape[1:])
    dist.all_to_all_single(out, parts.contiguous(), receive, send, group=group)
    return out


class Pending:
    """A collective that has been started: `wait()` returns its result."""

    def __init__(self, result: Tensor, work: dist.Work | None = None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        """Waits for the collective and returns its result; a second call returns the same."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


class TokenComm(Protocol):
    """Moves one chunk: c tokens of this rank, m tokens of all ranks, in rank order.

    A method that returns a `Pending` does not wait for the collective.
    """

    ranks: int  # ranks that have tokens of their own

    def max_tokens_per_rank(self, N: int, device: torch.device) -> int: ...
    def gather(self, mine_c: Tensor) -> Pending: ...  # [c, ...] -> [ranks, c, ...]
    def mine(self, all_m: Tensor) -> Tensor: ...  # [m, ...] -> [c, ...], a view
    def sum(self, partial_mD: Tensor) -> Pending: ...  # this shard's part -> the sum for this rank's tokens [c, D]
    def stack(self, statistics_km: Tensor) -> Pending: ...  # [k, m] -> [p, k, m], in rank order


class LocalComm:
    """Tokens of one process, which has all tokens and all rows."""

    ranks = 1

    def max_tokens_per_rank(self, N: int, device: torch.device) -> int:
        return N

    def gather(self, mine_c: Tensor) -> Pending:
        return Pending(mine_c.unsqueeze(0))

    def mine(self, all_m: Tensor) -> Tensor:
        return all_m

    def sum(self, partial_mD: Tensor) -> Pending:
        return Pending(partial_mD)

    def stack(self, statistics_km: Tensor) -> Pending:
        return Pending(statistics_km.unsqueeze(0))


class ReplicatedComm(LocalComm):
    """Tokens that are the same on every rank."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.world = dist.get_world_size(group)

    def sum(self, partial_mD: Tensor) -> Pending:
        return Pending(partial_mD, dist.all_reduce(partial_mD, group=self.group, async_op=True))

    def stack(self, statistics_km: Tensor) -> Pending:
        return self._all_gather(statistics_km)

    def _all_gather(self, mine: Tensor) -> Pending:
        stacked = mine.new_empty(self.world, *mine.shape)
        work = _all_gather(stacked.view(-1), mine.reshape(-1), group=self.group, async_op=True)
        return Pending(stacked, work)


class DistinctComm(ReplicatedComm):
    """Tokens that differ: every rank has its own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.ranks = self.world
        self.rank = dist.get_rank(group)

    def max_tokens_per_rank(self, N: int, device: torch.device) -> int:
        max_tokens_per_rank = torch.full((), N, device=device)  # torch.tensor would wait for the device
        dist.all_reduce(max_tokens_per_rank, dist.ReduceOp.MAX, group=self.group)
        return int(on_host(max_tokens_per_rank))

    def gather(self, mine_c: Tensor) -> Pending:
        return self._all_gather(mine_c)

    def mine(self, all_m: Tensor) -> Tensor:
        return all_m.chunk(self.ranks)[self.rank]

    def sum(self, partial_mD: Tensor) -> Pending:
        mine = partial_mD.new_empty(len(partial_mD) // self.ranks, *partial_mD.shape[1:])
        work = _reduce_scatter(mine.view(-1), partial_mD.reshape(-1), group=self.group, async_op=True)
        return Pending(mine, work)


def token_comm(shard: VocabShard, group: dist.ProcessGroup | None, tokens: str) -> TokenComm:
    """Returns how tokens travel: "distinct", each rank has its own, or "replicated", all have the same.

    Raises ValueError if `tokens` is another word, or if the shard is not this rank's shard of the group.
    """
    if tokens not in ("distinct", "replicated"):
        raise ValueError(f'tokens={tokens!r} must be "distinct" or "replicated"')
    check_group(shard, group)
    if group is None:
        return LocalComm()
    return DistinctComm(group) if tokens == "distinct" else ReplicatedComm(group)

"""The two collectives the vocabulary needs, under one name for all supported versions of torch."""

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] -> [p, ...] in rank order; without a group p = 1 and nothing moves. Every rank gives one shape."""
    if group is None:
        return mine.unsqueeze(0)
    world = dist.get_world_size(group)
    flat = mine.new_empty(world * mine.numel())
    _all_gather(flat, mine.reshape(-1), group=group)
    return flat.view(world, *mine.shape)


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[p, ...] -> [...]: the sum over the ranks of their part for me."""
    if group is None:
        return parts.squeeze(0)
    mine = parts.new_empty(parts.shape[1:])
    _reduce_scatter(mine.view(-1), parts.reshape(-1), group=group)
    return mine

"""Guards against wrappers that take a rank's rows for a replica or a whole matrix, and would silently damage them.

It stands apart from embedding.py, which computes: this module knows what torch's wrappers do to parameters.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .collectives import all_gather, on_host
from .shard import VocabShard

ROWS = ("weight", "head_weight")


class GuardedRows(nn.Module):
    """A module whose parameters are one rank's rows of a matrix: every rank of `group` has other rows."""

    def __init__(self, shard: VocabShard, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.shard, self.group = shard, group
        self.register_state_dict_pre_hook(_refuse_part)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises RuntimeError if fully_shard replaces the rows by a shard of them."""
        if name in ROWS and _is_sharded(value):
            raise RuntimeError(_RESHARDED)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Raises RuntimeError if FullyShardedDataParallel removes the rows."""
        if name in ROWS:
            raise RuntimeError(_RESHARDED)
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> "GuardedRows":
        """Raises ValueError if `to`, `half` or a similar call would change the rows' dtype; their device may change."""
        for rows in self.parameters(recurse=False):
            dtype = fn(rows.detach()[:0]).dtype
            if dtype != rows.dtype:
                raise ValueError(
                    f"the rows are main weights in {rows.dtype} and cannot become {dtype}: convert the body alone, and"
                    f" give create() compute_dtype={dtype} to compute in it (or dtype={dtype})"
                )
        super()._apply(fn, recurse)
        return self

    def check_distinct(self) -> None:
        """Raises RuntimeError if two ranks hold equal rows: something has copied one rank's rows over the other's.

        One all-gather of two numbers per matrix, and one pass over the rows.
        """
        for rows_vD in self.parameters(recurse=False):
            sums_v = rows_vD.detach().sum(dim=1, dtype=torch.float64)  # padding included: an overwritten shard has none
            by_row = torch.arange(1, len(sums_v) + 1, device=sums_v.device, dtype=sums_v.dtype)
            digest_2 = torch.stack([sums_v.sum(), sums_v @ by_row])
            seen: dict[tuple[float, ...], int] = {}
            for rank, numbers in enumerate(on_host(all_gather(digest_2, self.group)).tolist()):
                first = seen.setdefault(tuple(numbers), rank)
                if first != rank and numbers != [0.0, 0.0]:  # zeros: only padding, or no values yet
                    raise RuntimeError(
                        f"ranks {first} and {rank} own different rows of the vocabulary, but hold the same values: a"
                        " wrapper has copied one rank's over the other's; give it the body alone"
                    )


_RESHARDED = (
    "the rows of a VocabParallelEmbedding are one rank's already and cannot be sharded again: give fully_shard"
    " ignored_params=set(vocab.parameters()), FullyShardedDataParallel ignored_states=[vocab], or either the body alone"
)


def _is_sharded(value: object) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _refuse_part(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raises RuntimeError before a rank's state_dict presents its rows as the whole matrix."""
    assert isinstance(module, GuardedRows)
    shard = module.shard
    if shard.world > 1:
        raise RuntimeError(
            f"state_dict() of one rank would hold rows [{shard.start}, {shard.stop}) of the vocabulary's"
            f" {shard.padded_size} as the whole of {prefix}weight: call full_state_dict() on all ranks for whole"
            " matrices, or dtensor_state_dict() for torch.distributed.checkpoint"
        )


def _refuse_replication(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Raises RuntimeError if DistributedDataParallel wraps a module with rows and has not been asked to ignore them."""
    if not isinstance(parent, nn.parallel.DistributedDataParallel) or child is None:
        return
    rows = [
        ".".join(filter(None, (prefix, name)))
        for prefix, module in child.named_modules()
        if isinstance(module, GuardedRows)
        for name, _ in module.named_parameters(recurse=False)
    ]
    if not set(rows) <= set(getattr(child, "_ddp_params_and_buffers_to_ignore", ())):
        raise RuntimeError(
            f"DistributedDataParallel would overwrite each rank's rows of {', '.join(rows)} with those of rank 0: wrap"
            f" the body alone, or set _ddp_params_and_buffers_to_ignore = {rows} on the module that is wrapped; in both"
            " cases call the body through pretrain.vocab.summed"
        )


register_module_module_registration_hook(_refuse_replication)  # runs at `ddp.module = module`, before any broadcast

"""ids -> rows of a matrix split by vocabulary rows, for ranks with different tokens."""

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather, reduce_scatter
from .shard import VocabShard


def vocab_parallel_lookup(
    ids_N: Tensor,
    weight_vD: Tensor,
    *,
    shard: VocabShard,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of the split matrix for this rank's ids: hidden [N, D] in `dtype` (default: the weight's).

    Every rank brings as many ids. The gradient reaches `weight_vD` in its dtype, summed in fp32 over the ids of
    the whole group. Collectives: all-gather of the ids and reduce-scatter of [p·N, D] forward; all-gather of
    the gradient backward. Raises ValueError on an id outside [0, vocab_size) (on CUDA: a device assertion).
    """
    good = ((ids_N >= 0) & (ids_N < shard.vocab_size)).all()
    if ids_N.is_cuda:
        torch._assert_async(good)
    elif not good:
        raise ValueError(f"ids reach from {ids_N.min()} to {ids_N.max()}, outside [0, {shard.vocab_size})")
    hidden_ND: Tensor = _Lookup.apply(ids_N, weight_vD, shard, group, dtype or weight_vD.dtype)
    return hidden_ND


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids_N, weight_vD, shard, group, dtype):  # type: ignore[no-untyped-def]
        ids_M = all_gather(ids_N, group).flatten()
        mine_M = shard.holds(ids_M)
        ctx.group, ctx.rows, ctx.weight_dtype = group, shard.rows, weight_vD.dtype
        ctx.positions = mine_M.nonzero().squeeze(1)
        ctx.local = shard.local(ids_M[ctx.positions])
        hidden_MD = weight_vD.new_zeros(len(ids_M), weight_vD.shape[1], dtype=dtype)
        hidden_MD[ctx.positions] = weight_vD[ctx.local].to(dtype)
        # one rank adds, the others add zeros: exact in any dtype
        return reduce_scatter(hidden_MD.unflatten(0, (-1, len(ids_N))), group)

    @staticmethod
    def backward(ctx, dhidden_ND):  # type: ignore[no-untyped-def]
        dhidden_MD = all_gather(dhidden_ND, ctx.group).flatten(0, 1)
        accurate = torch.promote_types(ctx.weight_dtype, torch.float32)
        dweight_vD = dhidden_ND.new_zeros(ctx.rows, dhidden_ND.shape[1], dtype=accurate)
        dweight_vD.index_add_(0, ctx.local, dhidden_MD[ctx.positions].to(accurate))
        return None, dweight_vD.to(ctx.weight_dtype), None, None, None

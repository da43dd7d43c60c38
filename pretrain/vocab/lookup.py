"""ids -> rows of a matrix split by vocabulary rows, for ranks with different tokens.

A rank needs only the distinct ids of its tokens, and each has one owner. So only distinct rows cross the ranks:
forward the row, backward its summed gradient. Who sends what to whom is a `LookupPlan`. It follows from the ids alone:
a loader that knows every rank's tokens makes it ahead of time on the host, and then no id crosses and no device waits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather, all_to_all
from .shard import VocabShard


@dataclass(frozen=True)
class LookupPlan:
    """What one rank of p sends, receives and does with it, for one lookup of N ids.

    send_rows: my local rows that others need, [S], grouped by receiver; send_counts: how many for each, p numbers.
    receive_counts: distinct rows that I get from each, U in all, in the order of their ids. places_N: where each of
    my N ids stands among those U.
    """

    send_rows: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    places_N: Tensor

    @classmethod
    def of(cls, ids_pN: list[Tensor], shard: VocabShard) -> "LookupPlan":
        """The plan of `shard.rank`, from the ids of all ranks in rank order. Local; on the host if the ids are there.

        Raises ValueError on an id outside [0, vocab_size).
        """
        sends = []
        for ids_N in ids_pN:
            distinct_U = ids_N.unique()
            if len(distinct_U) and not 0 <= int(distinct_U[0]) <= int(distinct_U[-1]) < shard.vocab_size:
                low, high = int(distinct_U[0]), int(distinct_U[-1])
                raise ValueError(f"ids reach from {low} to {high}, outside [0, vocab_size={shard.vocab_size})")
            sends.append(shard.local(distinct_U[shard.holds(distinct_U)]))
        mine_U, places_N = ids_pN[shard.rank].unique(return_inverse=True)  # sorted, hence grouped by owner
        edges = torch.tensor(shard.edges, device=mine_U.device)
        receive_counts = torch.searchsorted(mine_U, edges).diff().tolist()
        return cls(torch.cat(sends), [len(rows) for rows in sends], receive_counts, places_N)

    def to(self, device: torch.device) -> "LookupPlan":
        send_rows, places_N = (part.to(device, non_blocking=True) for part in (self.send_rows, self.places_N))
        return LookupPlan(send_rows, self.send_counts, self.receive_counts, places_N)

    def pin_memory(self) -> "LookupPlan":
        return LookupPlan(
            self.send_rows.pin_memory(), self.send_counts, self.receive_counts, self.places_N.pin_memory()
        )


def vocab_parallel_lookup(
    ids_N: Tensor,
    weight_vD: Tensor,
    *,
    shard: VocabShard,
    group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    plan: LookupPlan | None = None,
) -> Tensor:
    """Rows of the split matrix for this rank's ids: hidden [N, D] in `dtype` (default: the weight's).

    The gradient reaches `weight_vD` in its dtype, summed in fp32 (float64 where the weight is) over the ids of the
    whole group, in rank order. Collectives: one all-to-all of distinct rows in `dtype` forward, one of their
    gradients in the accurate dtype backward. Without a `plan`, made of just these ids, every rank must bring as many
    ids; they are all-gathered first, and the device is waited for.

    Raises ValueError on an id outside [0, vocab_size) where it makes the plan, as `LookupPlan.of` does.
    """
    if plan is None:
        plan = LookupPlan.of(list(all_gather(ids_N, group)), shard)
    hidden_ND: Tensor = _Lookup.apply(weight_vD, plan, group, dtype or weight_vD.dtype)
    return hidden_ND


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_vD, plan, group, dtype):  # type: ignore[no-untyped-def]
        ctx.plan, ctx.group, ctx.like = plan, group, weight_vD.detach()
        sent_SD = weight_vD[plan.send_rows].to(dtype)
        received_UD = all_to_all(sent_SD, plan.send_counts, plan.receive_counts, group)
        return received_UD[plan.places_N]

    @staticmethod
    def backward(ctx, dhidden_ND):  # type: ignore[no-untyped-def]
        plan, weight_vD = ctx.plan, ctx.like
        accurate = torch.promote_types(weight_vD.dtype, torch.float32)
        dreceived_UD = dhidden_ND.new_zeros(sum(plan.receive_counts), dhidden_ND.shape[1], dtype=accurate)
        dreceived_UD.index_add_(0, plan.places_N, dhidden_ND.to(accurate))
        dsent_SD = all_to_all(dreceived_UD, plan.receive_counts, plan.send_counts, ctx.group)
        dweight_vD = torch.zeros_like(weight_vD, dtype=accurate)
        for rows, drows in zip(plan.send_rows.split(plan.send_counts), dsent_SD.split(plan.send_counts), strict=True):
            dweight_vD.index_add_(0, rows, drows)  # one rank at a time: its rows are distinct, the order is fixed
        return dweight_vD.to(weight_vD.dtype), None, None, None

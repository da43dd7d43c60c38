"""Linear layer, softmax and cross-entropy on a matrix split by vocabulary rows, without ever holding the logits.

Every rank multiplies the tokens of the whole group with its own rows, a chunk of tokens at a time, and the
ranks exchange a few floats a token: the softmax statistics of their shards. Sharded cross-entropy follows
Megatron-LM (Shoeybi et al., arXiv:1909.08053), with these differences: ranks may hold different tokens; the
chunk's gradients are formed while its logits are at hand, so nothing is recomputed (three matmuls, as in
Hsu et al., Liger Kernel, arXiv:2410.10989); and padding rows never enter the matmul.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Alone, Distinct, Replicated, Traffic
from .shard import VocabShard

LOGITS_BYTES = 64 * 2**20  # of one chunk's logits in fp32; small enough to stay near the caches
LARGEST_VOCABULARY = 2**24  # ids travel among the fp32 statistics and must be exact there


@dataclass(frozen=True)
class VocabLoss:
    """What `vocab_parallel_linear_cross_entropy` returns. Only `loss` is differentiable.

    loss: sum over this rank's valid targets, in nats, fp32 scalar; with reduction="none" one value a token
        (0 where ignored). n_tokens: the number of valid targets, int64 scalar. lse, entropy: log-sum-exp of
        the logits and entropy of the softmax in nats, [N], also for ignored tokens. correct: [N], True where
        the valid target is the largest logit (lowest id on ties).
    """

    loss: Tensor
    n_tokens: Tensor
    lse: Tensor
    correct: Tensor
    entropy: Tensor


def vocab_parallel_linear_cross_entropy(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    targets_N: Tensor,
    *,
    shard: VocabShard,
    group: dist.ProcessGroup | None = None,
    tokens: Literal["distinct", "replicated"] = "distinct",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["sum", "none"] = "sum",
    chunk_tokens: int | None = None,
) -> VocabLoss:
    """Cross-entropy of softcap(hidden @ W.T) against the targets; W is split over `group` by rows.

    Per token: lse - (1-ε)·z[y] - ε·mean(z) + λ·lse², with ε = `label_smoothing` and λ = `z_loss`; z, lse and
    the mean are over all rows but padding, of all ranks. Matmuls run in hidden's dtype, statistics in fp32 (in
    float64 where hidden is). The gradient of `weight_vD` has its dtype, is summed over the tokens of the group
    and is zero on padding rows. `group=None` is one process, without a process group.

    "distinct": every rank has its own tokens, of any number. It gets their loss and their gradient.
    "replicated": every rank has the same tokens (tensor parallelism) and gets the whole loss and gradient.

    At most `chunk_tokens` of the group's tokens are in work at once (default: as many as keep a chunk's
    logits below 64 MiB). Collectives a chunk: all-gathers of hidden and targets (distinct) and of 6 statistics
    a token, reduce-scatter (all-reduce) of the gradient of hidden in fp32; besides, two of a single number.

    Raises ValueError on shapes that do not fit the shard and on a target outside [0, vocab_size) other than
    `ignore_index` (on CUDA, where looking would stall the host, such a target is a device-side assertion).
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f'reduction={reduction!r} must be "sum" or "none"')
    if tokens not in ("distinct", "replicated"):
        raise ValueError(f'tokens={tokens!r} must be "distinct" or "replicated"')
    _check_shapes(hidden_ND, weight_vD, targets_N, shard)
    _check_targets(targets_N, shard.vocab_size, ignore_index)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive (or None for no cap)")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    traffic: Traffic = Alone()
    if group is not None:
        traffic = Distinct(group) if tokens == "distinct" else Replicated(group)
        if (shard.rank, shard.world) != (dist.get_rank(group), dist.get_world_size(group)):
            raise ValueError(f"shard {shard.rank} of {shard.world} does not fit this rank of its group")
    elif shard.world != 1:
        raise ValueError(f"a shard of world={shard.world} needs its process group")
    head = _Head(shard, traffic, z_loss, label_smoothing, softcap, chunk_tokens or _chunk_tokens(shard))

    valid_N = targets_N != ignore_index
    targets_N = torch.where(valid_N, targets_N, -1)
    differentiated = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_vD.requires_grad)
    function = _TokenLosses if reduction == "none" else _LossSum
    loss, lse_N, best_N, entropy_N = function.apply(hidden_ND, weight_vD, targets_N, head, differentiated)
    return VocabLoss(loss, valid_N.sum(), lse_N, valid_N & (best_N == targets_N), entropy_N)


def _check_shapes(hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, shard: VocabShard) -> None:
    N, D = hidden_ND.shape
    if weight_vD.shape != (shard.rows, D):
        raise ValueError(
            f"weight has shape {tuple(weight_vD.shape)}; hidden of width {D} and the shard of rows "
            f"[{shard.start}, {shard.stop}) need ({shard.rows}, {D})"
        )
    if targets_N.shape != (N,):
        raise ValueError(f"targets have shape {tuple(targets_N.shape)}; {N} hidden states need ({N},)")
    if shard.padded_size > LARGEST_VOCABULARY:
        raise ValueError(f"{shard.padded_size} rows are more than the {LARGEST_VOCABULARY} that are supported")


def _check_targets(targets_N: Tensor, vocab_size: int, ignore_index: int) -> None:
    good_N = (targets_N == ignore_index) | ((targets_N >= 0) & (targets_N < vocab_size))
    if targets_N.is_cuda:
        torch._assert_async(good_N.all())
    elif not good_N.all():
        position = int((~good_N).nonzero()[0])
        raise ValueError(
            f"target {int(targets_N[position])} at position {position} is outside [0, vocab_size={vocab_size})"
            f" and is not ignore_index={ignore_index}"
        )


def _chunk_tokens(shard: VocabShard) -> int:
    return max(1, LOGITS_BYTES // (4 * shard.rows_per_rank))


# --- the mathematics of one chunk -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    """The loss of a chunk of m tokens on this shard's rows, and its gradients."""

    shard: VocabShard
    traffic: Traffic
    z_loss: float
    smoothing: float
    softcap: float | None
    chunk: int  # m, the tokens of all ranks in work at once

    def logits(self, hidden_mD: Tensor, weight_vD: Tensor, targets_m: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the valid rows [m, valid] in fp32, and the target's [m], 0 where it is not mine."""
        accurate = _statistics_dtype(hidden_mD)
        logits_mv = (hidden_mD @ weight_vD.T).to(accurate)
        mine_m, rows_m = self._target_rows(targets_m)
        if weight_vD.shape[0] == 0:
            return logits_mv, hidden_mD.new_zeros(len(hidden_mD), dtype=accurate)
        # A low-precision matmul rounds its output; the target's logit is worth an exact one. It also stands
        # among the others, so that no token's loss can fall below zero.
        target_m = (hidden_mD.to(accurate) * weight_vD[rows_m].to(accurate)).sum(-1)
        column_m1 = rows_m.unsqueeze(1)
        kept_m1 = logits_mv.gather(1, column_m1)
        logits_mv.scatter_(1, column_m1, torch.where(mine_m.unsqueeze(1), target_m.unsqueeze(1), kept_m1))
        if self.softcap is not None:
            logits_mv.div_(self.softcap).tanh_().mul_(self.softcap)
            target_m = self.softcap * torch.tanh(target_m / self.softcap)
        return logits_mv, torch.where(mine_m, target_m, 0.0)

    def statistics(self, logits_mv: Tensor, target_m: Tensor) -> Tensor:
        """Of this shard, packed [6, m]: max, its id, Σexp(z-max), Σz·exp(z-max), Σz, the target's logit."""
        if logits_mv.shape[1] == 0:  # a finite floor: merging never subtracts infinities
            floor_m = torch.full_like(target_m, torch.finfo(target_m.dtype).min)
            zero_m = torch.zeros_like(target_m)
            return torch.stack([floor_m, zero_m, zero_m, zero_m, zero_m, target_m])
        max_m, best_m = logits_mv.max(1)
        exp_mv = (logits_mv - max_m.unsqueeze(1)).exp_()
        sum_m = exp_mv.sum(1)
        weighted_m = exp_mv.mul_(logits_mv).sum(1)
        logit_sum_m = logits_mv.sum(1) if self.smoothing else torch.zeros_like(max_m)
        id_m = (best_m + self.shard.start).to(max_m.dtype)
        return torch.stack([max_m, id_m, sum_m, weighted_m, logit_sum_m, target_m])

    def merge(self, stacked_pkm: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The statistics of all shards -> loss, log-sum-exp, id of the largest logit, entropy; each [m]."""
        max_pm, id_pm, sum_pm, weighted_pm, logit_sum_pm, target_pm = stacked_pkm.unbind(1)
        max_m, winner_m = max_pm.max(0)  # the lowest rank on ties, hence the lowest id
        scale_pm = (max_pm - max_m).exp()
        sum_m = (sum_pm * scale_pm).sum(0)
        lse_m = max_m + sum_m.log()
        entropy_m = lse_m - (weighted_pm * scale_pm).sum(0) / sum_m
        loss_m = lse_m - (1 - self.smoothing) * target_pm.sum(0)
        loss_m -= self.smoothing / self.shard.vocab_size * logit_sum_pm.sum(0)
        loss_m += self.z_loss * lse_m.square()
        return loss_m, lse_m, id_pm.gather(0, winner_m.unsqueeze(0)).squeeze(0).long(), entropy_m

    def gradients(
        self, hidden_mD: Tensor, weight_vD: Tensor, targets_m: Tensor, logits_mv: Tensor, lse_m: Tensor, g_m: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This shard's part of d hidden [m, D] and d weight [valid, D], in fp32; overwrites the logits.

        g [m] is the gradient of each token's loss. The target's entry, p - 1, is left out of the matmuls and
        added in fp32: rounded to bf16 it would carry nearly all of the error.
        """
        accurate = logits_mv.dtype
        if weight_vD.shape[0] == 0:
            return hidden_mD.new_zeros(hidden_mD.shape, dtype=accurate), weight_vD.to(accurate)
        mine_m, rows_m = self._target_rows(targets_m)
        column_m1 = rows_m.unsqueeze(1)
        slope_mv = 1 - (logits_mv / self.softcap).square_() if self.softcap is not None else None
        softmax_m1 = (g_m * (1 + 2 * self.z_loss * lse_m)).unsqueeze(1)
        share_m1 = (g_m * (self.smoothing / self.shard.vocab_size)).unsqueeze(1)

        dlogits_mv = logits_mv.sub_(lse_m.unsqueeze(1)).exp_().mul_(softmax_m1)
        if self.smoothing:
            dlogits_mv.sub_(share_m1)
        if slope_mv is not None:
            dlogits_mv.mul_(slope_mv)
        kept_m1 = dlogits_mv.gather(1, column_m1)
        slope_m1 = slope_mv.gather(1, column_m1) if slope_mv is not None else 1.0
        target_m1 = kept_m1 - slope_m1 * (1 - self.smoothing) * g_m.unsqueeze(1)
        mine_m1 = mine_m.unsqueeze(1)
        dlogits_mv.scatter_(1, column_m1, kept_m1.masked_fill(mine_m1, 0.0))
        target_m1 = target_m1.masked_fill(~mine_m1, 0.0)

        compute_mv = dlogits_mv.to(hidden_mD.dtype)
        dhidden_mD = (compute_mv @ weight_vD).to(accurate)
        dhidden_mD.addcmul_(target_m1, weight_vD[rows_m].to(accurate))
        dweight_vD = (compute_mv.T @ hidden_mD).to(accurate)
        dweight_vD.index_add_(0, rows_m, target_m1 * hidden_mD.to(accurate))
        return dhidden_mD, dweight_vD

    def _target_rows(self, targets_m: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the target is mine, and its local row (row 0 where it is not: to be masked)."""
        mine_m = self.shard.holds(targets_m)
        return mine_m, torch.where(mine_m, self.shard.local(targets_m), 0)


def _statistics_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


# --- all chunks -------------------------------------------------------------------------------------------


@dataclass
class _Tokens:
    """This rank's tokens, cut into as many chunks as the rank with the most tokens needs."""

    hidden_ND: Tensor
    targets_N: Tensor
    extra_kN: Tensor  # what else must travel with each token: [k, N]
    traffic: Traffic
    chunk: int

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yields my tokens' slice and the group's hidden [m, D], targets [m] (-1: ignored), extra [k, m]."""
        N, traffic = len(self.hidden_ND), self.traffic
        longest = traffic.longest(N, self.hidden_ND.device)
        size = max(1, min(self.chunk // traffic.ranks, longest))
        for start in range(0, longest, size):
            mine = slice(min(start, N), min(start + size, N))
            c = min(size, longest - start)
            missing = c - (mine.stop - mine.start)
            hidden_cD = torch.nn.functional.pad(self.hidden_ND[mine], (0, 0, 0, missing))
            targets_c = torch.nn.functional.pad(self.targets_N[mine], (0, missing), value=-1)
            extra_ck = torch.nn.functional.pad(self.extra_kN[:, mine].T, (0, 0, 0, missing))
            extra_mk = traffic.gather(extra_ck) if len(self.extra_kN) else extra_ck.new_empty(0, 0)
            yield mine, traffic.gather(hidden_cD), traffic.gather(targets_c), extra_mk.T


@dataclass(frozen=True)
class _Result:
    """Of this rank's tokens: loss, log-sum-exp, id of the largest logit, entropy; and the gradients of Σloss, fp32."""

    loss_N: Tensor
    lse_N: Tensor
    best_N: Tensor
    entropy_N: Tensor
    dhidden_ND: Tensor
    dweight_vD: Tensor


def _forward(head: _Head, hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, with_gradients: bool) -> _Result:
    """Loss and statistics; with_gradients also the gradients of the sum of all ranks' losses."""
    N, accurate = len(hidden_ND), _statistics_dtype(hidden_ND)
    compute_vD = weight_vD[: head.shard.valid_rows].to(hidden_ND.dtype)
    loss_N, lse_N, entropy_N = hidden_ND.new_empty(3, N, dtype=accurate).unbind()
    best_N = torch.empty_like(targets_N)
    dhidden_ND = hidden_ND.new_empty(hidden_ND.shape if with_gradients else 0, dtype=accurate)
    dweight_vD = torch.zeros_like(weight_vD, dtype=accurate) if with_gradients else weight_vD.new_empty(0)
    nothing = hidden_ND.new_empty(0, N)
    for mine, hidden_mD, targets_m, _ in _Tokens(hidden_ND, targets_N, nothing, head.traffic, head.chunk):
        logits_mv, target_m = head.logits(hidden_mD, compute_vD, targets_m)
        stacked_pkm = head.traffic.stack(head.statistics(logits_mv, target_m))
        merged = head.merge(stacked_pkm)
        for out_N, chunk_m in zip((loss_N, lse_N, best_N, entropy_N), merged, strict=True):
            out_N[mine] = head.traffic.mine(chunk_m)[: mine.stop - mine.start]
        if with_gradients:
            g_m = (targets_m >= 0).to(accurate)
            part_mD, part_vD = head.gradients(hidden_mD, compute_vD, targets_m, logits_mv, merged[1], g_m)
            dhidden_ND[mine] = head.traffic.sum(part_mD)[: mine.stop - mine.start]
            dweight_vD[: len(part_vD)] += part_vD
    loss_N = torch.where(targets_N >= 0, loss_N, 0.0)
    return _Result(loss_N, lse_N, best_N, entropy_N, dhidden_ND, dweight_vD)


def _recompute(
    head: _Head, hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients from saved log-sum-exps, for any gradient g of each token's loss; one more matmul."""
    compute_vD = weight_vD[: head.shard.valid_rows].to(hidden_ND.dtype)
    dhidden_ND = torch.empty_like(hidden_ND)
    dweight_vD = torch.zeros_like(weight_vD, dtype=lse_N.dtype)
    extra_kN = torch.stack([lse_N, torch.where(targets_N >= 0, g_N, 0.0).to(lse_N.dtype)])
    for mine, hidden_mD, targets_m, extra_km in _Tokens(hidden_ND, targets_N, extra_kN, head.traffic, head.chunk):
        logits_mv, _ = head.logits(hidden_mD, compute_vD, targets_m)
        part_mD, part_vD = head.gradients(hidden_mD, compute_vD, targets_m, logits_mv, *extra_km)
        dhidden_ND[mine] = head.traffic.sum(part_mD)[: mine.stop - mine.start].to(hidden_ND.dtype)
        dweight_vD[: len(part_vD)] += part_vD
    return dhidden_ND, dweight_vD.to(weight_vD.dtype)


class _TokenLosses(torch.autograd.Function):
    """reduction="none": the gradients wait for backward, where each token's own factor is known."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_vD, targets_N, head, differentiated):  # type: ignore[no-untyped-def]
        result = _forward(head, hidden_ND, weight_vD, targets_N, with_gradients=False)
        ctx.head = head
        ctx.save_for_backward(hidden_ND, weight_vD, targets_N, result.lse_N)
        outputs = (result.loss_N, result.lse_N, result.best_N, result.entropy_N)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, g_N, *_):  # type: ignore[no-untyped-def]
        hidden_ND, weight_vD, targets_N, lse_N = ctx.saved_tensors
        return *_recompute(ctx.head, hidden_ND, weight_vD, targets_N, lse_N, g_N), None, None, None


class _LossSum(torch.autograd.Function):
    """reduction="sum": the gradients are made in forward, while the logits are at hand."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_vD, targets_N, head, differentiated):  # type: ignore[no-untyped-def]
        result = _forward(head, hidden_ND, weight_vD, targets_N, with_gradients=differentiated)
        if differentiated:
            ctx.head = head
            ctx.save_for_backward(hidden_ND, weight_vD, targets_N, result.lse_N, result.dhidden_ND, result.dweight_vD)
        outputs = (result.loss_N.sum(), result.lse_N, result.best_N, result.entropy_N)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, g, *_):  # type: ignore[no-untyped-def]
        hidden_ND, weight_vD, targets_N, lse_N, dhidden_ND, dweight_vD = ctx.saved_tensors
        # dW sums over the tokens of every rank, each of which may scale its loss in its own way.
        g_p = ctx.head.traffic.gather(g.reshape(1))
        if (g_p == g_p[0]).all():
            gradients = (dhidden_ND * g).to(hidden_ND.dtype), (dweight_vD * g).to(weight_vD.dtype)
        else:
            gradients = _recompute(ctx.head, hidden_ND, weight_vD, targets_N, lse_N, g.expand(len(hidden_ND)))
        return *gradients, None, None, None

"""Linear layer, softmax and cross-entropy on a matrix split by vocabulary rows, without ever holding all logits.

Every rank multiplies the tokens of the whole group with its own rows, a chunk of tokens at a time. The ranks exchange
a few floats per token: the softmax statistics of their shards. Sharded cross-entropy follows Megatron-LM (Shoeybi et
al., arXiv:1909.08053), with three differences. Ranks may have different tokens. A chunk's gradients are made while its
logits are in memory, so nothing is recomputed. Padding rows never enter the matmul. The mathematics is in head.py, the
kernels are in kernels/, and docs/how-it-works.md derives it all.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.vocab import LARGEST_VOCABULARY
from .checks import violated
from .chunks import Chunks, chunk_budget
from .collectives import on_host, token_comm
from .head import Gradients, Head, RowGradient, compute_losses, recompute_gradients
from .kernels import Kernels, choose_kernels
from .kernels.base import accurate_dtype
from .objective import Objective
from .shard import VocabShard


@dataclass(frozen=True)
class VocabLoss:
    """Result of `vocab_parallel_linear_cross_entropy`, in nats. Only `loss` is differentiable.

    >>> hidden, rows, targets = torch.zeros(3, 8), torch.zeros(128, 8), torch.tensor([5, 0, -100])
    >>> out = vocab_parallel_linear_cross_entropy(hidden, rows, targets, shard=VocabShard.of(0, 1, vocab_size=100))
    >>> out.n_tokens.item(), round(out.loss.item() / 2, 4)  # log(100)
    (2, 4.6052)
    >>> out.correct  # all logits are equal, so the largest is that of id 0
    tensor([False,  True, False])
    """

    loss: Tensor  # sum over this rank's valid targets, fp32 scalar; with reduction="none" [N], 0 if ignored
    n_tokens: Tensor  # number of valid targets, int64 scalar
    lse: Tensor  # log-sum-exp of the logits [N], also of ignored tokens
    correct: Tensor | None  # [N], True if the valid target has the largest logit (lowest id on ties); None: no metrics
    entropy: Tensor | None  # entropy of the softmax [N], also of ignored tokens; None: no metrics


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
    memory_mib: int | None = None,
    metrics: bool = True,
    max_tokens_per_rank: int | None = None,
    scale: float = 1.0,
    main_grad_vD: Tensor | None = None,
    main_grad_is_new: bool = False,
    compute_weight_vD: Tensor | None = None,
    kernels: Kernels | None = None,
) -> VocabLoss:
    """Computes the cross-entropy of softcap(hidden @ W.T) against the targets; W is split over `group` by rows.

    Per token: lse - (1-ε)·z[y] - ε·mean(z) + λ·lse², with ε = `label_smoothing` and λ = `z_loss`. z, lse and the mean
    are over all rows of all ranks, without padding. The loss is multiplied by `scale`, which must be the same on all
    ranks. Matmuls run in hidden's dtype, statistics in fp32 (float64 if hidden is). The gradient of `weight_vD` has its
    dtype, is summed over the tokens of the group, and is zero on padding rows. `group=None` means one process, without
    a process group.

    tokens="distinct": every rank has its own tokens, any number of them, and gets their loss and their gradient.
    tokens="replicated": every rank has the same tokens (tensor parallelism), and gets the whole loss and gradient.

    `main_grad_vD`: a buffer, fp32 (float64 if hidden is), to which forward adds the rows' gradient if gradients are
    enabled. Then no second buffer of its size is made, and `weight_vD` gets no gradient. Call backward() on the loss
    once, and without another factor, which is a ValueError: pass the factor as `scale`. `main_grad_is_new`: the buffer
    is uninitialised. The gradient overwrites it, so it is not filled with zeros first. Without `main_grad_vD` the
    gradients of the sum are made in forward, too, and scaled in backward. They are recomputed, by one more matmul, for
    reduction="none", if ranks scale their losses differently, and if backward runs again.

    The group's tokens are processed in chunks that need about `memory_mib` (None: what suits the device, or a quarter
    of the rows' gradient if that is more), or that have at most `chunk_tokens` tokens. `max_tokens_per_rank`: the
    largest N in the group, if every rank knows it already; it saves one all-reduce. `metrics`: also compute entropy and
    correct. `compute_weight_vD`: the result of `compute_rows`, if the caller has it, and the rows have not changed
    since; None: it is made for this call. `kernels`: None chooses them by hidden's device.

    Collectives per chunk: all-gather of hidden (distinct), all-gather of 3 statistics per token (1 more with smoothing,
    2 more with metrics), reduce-scatter (replicated: all-reduce) of hidden's gradient in fp32. All run behind matmuls.
    Collectives per call: one all-gather of the targets; one of a number for `max_tokens_per_rank` unless it is given,
    and one of a number in backward unless `main_grad_vD` is given.

    Raises ValueError if shapes do not match the shard, and if a target is outside [0, vocab_size) other than
    `ignore_index` (on CUDA, where reading it would stall the host, the target fails a device-side assertion).

    In one process it is the usual cross-entropy:

    >>> generator = torch.Generator().manual_seed(0)
    >>> hidden = torch.randn(3, 8, generator=generator, requires_grad=True)
    >>> rows = torch.randn(100, 8, generator=generator, requires_grad=True)
    >>> targets = torch.tensor([5, 99, -100])
    >>> shard = VocabShard.of(rank=0, world=1, vocab_size=100, multiple=1)
    >>> out = vocab_parallel_linear_cross_entropy(hidden, rows, targets, shard=shard)
    >>> dense = torch.nn.functional.cross_entropy(hidden @ rows.T, targets, reduction="sum")
    >>> torch.testing.assert_close(out.loss, dense)
    >>> out.loss.backward()
    >>> rows.grad.shape
    torch.Size([100, 8])
    """
    _check_options(reduction, softcap, label_smoothing, chunk_tokens, memory_mib, main_grad_vD)
    _check_shapes(hidden_ND, weight_vD, targets_N, main_grad_vD, shard)
    _check_targets(targets_N, shard.vocab_size, ignore_index)

    kernels = kernels or choose_kernels(hidden_ND.device)
    head = Head(
        shard=shard,
        traffic=token_comm(shard, group, tokens),
        kernels=kernels,
        objective=Objective(shard.vocab_size, z_loss, label_smoothing, softcap, metrics),
    )
    budget = chunk_tokens or chunk_budget(shard, hidden_ND.shape[1], hidden_ND.dtype, memory_mib, kernels)
    valid_N = targets_N != ignore_index
    targets_N = torch.where(valid_N, targets_N, -1)
    call = _Call(head, targets_N, scale, budget, max_tokens_per_rank, compute_weight_vD)
    main_grad = None if main_grad_vD is None else RowGradient(main_grad_vD, main_grad_is_new)
    loss = _differentiable(hidden_ND, weight_vD, call, reduction, main_grad)
    results = call.results
    correct_N = valid_N & (results["best"] == targets_N) if metrics else None
    return VocabLoss(loss, valid_N.sum(), results["lse"], correct_N, results.get("entropy"))


def _check_options(
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    chunk_tokens: int | None,
    memory_mib: int | None,
    main_grad_vD: Tensor | None,
) -> None:
    if reduction not in ("sum", "none"):
        raise ValueError(f'reduction={reduction!r} must be "sum" or "none"')
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive (or None for no cap)")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    if memory_mib is not None and memory_mib < 1:
        raise ValueError(f"memory_mib={memory_mib} must be at least 1")
    if main_grad_vD is not None and not main_grad_vD.is_contiguous():
        raise ValueError("main_grad_vD must be contiguous")
    if main_grad_vD is not None and reduction == "none":
        raise ValueError('main_grad_vD needs reduction="sum": the factors of single tokens come with backward')


def _check_shapes(
    hidden_ND: Tensor, weight_vD: Tensor, targets_N: Tensor, main_grad_vD: Tensor | None, shard: VocabShard
) -> None:
    N, D = hidden_ND.shape
    if weight_vD.shape != (shard.rows, D):
        raise ValueError(
            f"weight has shape {tuple(weight_vD.shape)}; hidden of width {D} and the shard of rows "
            f"[{shard.start}, {shard.stop}) need ({shard.rows}, {D})"
        )
    if targets_N.shape != (N,):
        raise ValueError(f"targets have shape {tuple(targets_N.shape)}; {N} hidden states need ({N},)")
    accurate = accurate_dtype(hidden_ND.dtype)
    if main_grad_vD is not None and (main_grad_vD.shape != weight_vD.shape or main_grad_vD.dtype != accurate):
        raise ValueError(
            f"main_grad has shape {tuple(main_grad_vD.shape)} and dtype {main_grad_vD.dtype}; weight of shape"
            f" {tuple(weight_vD.shape)} and hidden of {hidden_ND.dtype} need one like the weight, {accurate}"
        )
    if shard.padded_size > LARGEST_VOCABULARY:
        raise ValueError(f"{shard.padded_size} rows are more than the {LARGEST_VOCABULARY} that are supported")


def _check_targets(targets_N: Tensor, vocab_size: int, ignore_index: int) -> None:
    good_N = (targets_N == ignore_index) | ((targets_N >= 0) & (targets_N < vocab_size))
    if violated(good_N.all()):
        position = int((~good_N).nonzero()[0])
        raise ValueError(
            f"target {int(targets_N[position])} at position {position} is outside [0, vocab_size={vocab_size})"
            f" and is not ignore_index={ignore_index}"
        )


@dataclass
class _Call:
    """One call of the function without its differentiable inputs; `results` as in `compute_losses`."""

    head: Head
    targets_N: Tensor  # -1: ignored
    scale: float
    budget: int
    max_tokens_per_rank: int | None
    compute_weight_vD: Tensor | None
    results: dict[str, Tensor] = field(default_factory=dict)

    def losses(self, hidden_ND: Tensor, weight_vD: Tensor, into: tuple[Tensor, RowGradient] | None = None) -> Tensor:
        """Returns scale · loss [N], 0 if ignored. `into`: buffers for its sum's gradients, d hidden and d weight."""
        compute_vD = self._compute_rows(weight_vD, hidden_ND.dtype)
        gradients = None if into is None else Gradients(self.head, compute_vD, *into)
        chunks = self._chunks(hidden_ND)
        self.results = compute_losses(self.head, chunks, compute_vD, self.targets_N, self.scale, gradients)
        return self.results["loss"] * self.scale

    def recompute(self, hidden_ND: Tensor, weight_vD: Tensor, g_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of Σ g · scale · loss: d hidden and d weight."""
        compute_vD = self._compute_rows(weight_vD, hidden_ND.dtype)
        into = self.empty_gradients(hidden_ND, weight_vD)
        chunks, lse_N = self._chunks(hidden_ND), self.results["lse"]
        gradients = Gradients(self.head, compute_vD, *into)
        recompute_gradients(self.head, chunks, compute_vD, self.targets_N, lse_N, g_N * self.scale, gradients)
        return into[0], into[1].rows_vD

    def empty_gradients(self, hidden_ND: Tensor, weight_vD: Tensor) -> tuple[Tensor, RowGradient]:
        accurate = accurate_dtype(hidden_ND.dtype)
        dhidden_ND, dweight_vD = (
            torch.empty_like(tensor, dtype=accurate, memory_format=torch.contiguous_format)
            for tensor in (hidden_ND, weight_vD)
        )
        return dhidden_ND, RowGradient(dweight_vD, new=True)

    def _compute_rows(self, weight_vD: Tensor, dtype: torch.dtype) -> Tensor:
        if self.compute_weight_vD is not None:
            return self.compute_weight_vD
        return compute_rows(weight_vD, self.head.shard, dtype)

    def _chunks(self, hidden_ND: Tensor) -> Chunks:
        chunks = Chunks(self.head.traffic, hidden_ND.detach().contiguous(), self.budget, self.max_tokens_per_rank)
        self.max_tokens_per_rank = chunks.max_tokens_per_rank
        return chunks


def compute_rows(weight_vD: Tensor, shard: VocabShard, dtype: torch.dtype) -> Tensor:
    """Returns the rows that have logits, in the dtype of the matmuls; a view if that is the weight's dtype.

    A copy goes out of date without a sign when an optimizer changes the rows.
    """
    return weight_vD.detach()[: shard.valid_rows].to(dtype).contiguous()


def _differentiable(
    hidden_ND: Tensor, weight_vD: Tensor, call: _Call, reduction: str, main_grad: RowGradient | None
) -> Tensor:
    """Returns the loss, with the backward that suits `reduction` and `main_grad`."""
    if not torch.is_grad_enabled():
        losses_N = call.losses(hidden_ND, weight_vD)
        return losses_N.sum() if reduction == "sum" else losses_N
    if reduction == "none":
        return _TokenLosses.apply(hidden_ND, weight_vD, call)
    if main_grad is None:
        return _LossSum.apply(hidden_ND, weight_vD, call)
    return _FinalLossSum.apply(hidden_ND, weight_vD, call, main_grad)


class _TokenLosses(torch.autograd.Function):
    """Losses per token (reduction="none"): the gradients wait for backward, when each token's factor is known."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_vD, call):  # type: ignore[no-untyped-def]
        ctx.call = call
        ctx.save_for_backward(hidden_ND, weight_vD)
        return call.losses(hidden_ND, weight_vD)

    @staticmethod
    def backward(ctx, g_N):  # type: ignore[no-untyped-def]
        hidden_ND, weight_vD = ctx.saved_tensors
        dhidden_ND, dweight_vD = ctx.call.recompute(hidden_ND, weight_vD, g_N)
        return dhidden_ND.to(hidden_ND.dtype), dweight_vD.to(weight_vD.dtype), None


class _LossSum(torch.autograd.Function):
    """Sum of the losses (reduction="sum"): the gradients are made in forward, while the logits are in memory."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_vD, call):  # type: ignore[no-untyped-def]
        ctx.call, ctx.made = call, None
        ctx.save_for_backward(hidden_ND, weight_vD)
        if any(ctx.needs_input_grad):
            ctx.made = call.empty_gradients(hidden_ND, weight_vD)
        return call.losses(hidden_ND, weight_vD, into=ctx.made).sum()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        hidden_ND, weight_vD = ctx.saved_tensors
        made, ctx.made = ctx.made, None  # passed on, not copied: a second backward makes its own
        # dW sums over the tokens of all ranks, and each rank may scale its loss differently.
        g_p = ctx.call.head.traffic.gather(g.reshape(1)).wait()
        if made is not None and bool(on_host((g_p == g_p[0]).all())):
            dhidden_ND, dweight_vD = made[0].mul_(g), made[1].rows_vD.mul_(g)
        else:
            del made
            dhidden_ND, dweight_vD = ctx.call.recompute(hidden_ND, weight_vD, g.expand(len(hidden_ND)))
        return dhidden_ND.to(hidden_ND.dtype), dweight_vD.to(weight_vD.dtype), None


class _FinalLossSum(torch.autograd.Function):
    """Sum of the losses with a main gradient: it is complete after forward; backward returns hidden's gradient."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_vD, call, main_grad):  # type: ignore[no-untyped-def]
        ctx.dhidden_ND = torch.empty_like(hidden_ND)
        return call.losses(hidden_ND, weight_vD, into=(ctx.dhidden_ND, main_grad)).sum()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        if ctx.dhidden_ND is None:
            raise RuntimeError("backward ran already on this loss; its rows' gradient would not be added again")
        if violated(g == 1):
            raise ValueError(
                f"the rows' gradient was made for this loss as it is, not for {float(g)} times it: use scale"
            )
        dhidden_ND, ctx.dhidden_ND = ctx.dhidden_ND, None
        return dhidden_ND, None, None, None

"""The mathematics of the loss on one shard, a chunk of tokens at a time, with the normaliser deferred.

The derivation in short; docs/how-it-works.md has it in full, in the same symbols. X [m, D] are the chunk's hidden
states, W_r [v, D] the rows of rank r, z = x · w the logits, y the target, g the factor of a token's loss.

    1. gather     X, from all ranks                                                   all-gather, one chunk ahead
    2. matmul 1   Z_r = X W_rᵀ;  a_r ≈ max z;  s_r = Σ exp(z - a_r);  t_r = z[y], or 0 if w_y is another rank's;
                  E_r = exp(Z_r - a_r), but 0 in the target's place
    3. exchange   a_r, s_r, t_r of every token                                        all-gather, behind matmul 2
       matmul 2   P_r = E_r W_r
    4. merge      a = max a_r;  lse = a + log Σ s_r exp(a_r - a);  loss = lse - Σ t_r
                  softmax of an own row: exp(z - a_r) · α_r, with α_r = exp(a_r - lse), one number per token
                  dX_r = g (α_r ⊙ P_r + β w_y), with β = softmax[y] - 1 on the rank that owns w_y, else 0
    5. reduce     dX = Σ dX_r, for my tokens, in fp32                                 reduce-scatter, behind matmul 3
       matmul 3   dW_r += E_rᵀ (g α_r ⊙ X), and dw_y += g β x

α_r scales rows of E_r, so it can be applied after matmul 2, which does not wait for it. Three matmuls are enough
because the gradient is made while the logits are in memory, as in Hsu et al. (Liger Kernel, arXiv:2410.10989) and Guo
et al. (QuACK); others recompute the logits in backward. Yeung et al. ("Balancing pipeline parallelism with vocabulary
parallelism", arXiv:2411.05288) defer the normaliser in the same way. β stays out of E_r, and is added in fp32: rounded
to bf16, it would carry nearly all of the gradient's error.

In the code E_r is `unnormalised_probs_mv`, P_r `product_mD`, and `TokenFactors` (objective.py) has g α_r and g β. Any
number near the maximum can be the shift a_r, so one pass over the logits is enough.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import Chunk, Chunks
from .collectives import Pending, TokenComm
from .kernels import Kernels
from .kernels.base import accurate_dtype
from .objective import Objective, TokenFactors
from .shard import VocabShard


@dataclass(frozen=True)
class ChunkOnShard:
    """One chunk of m tokens on this shard."""

    mine: slice  # this rank's tokens in the chunk
    hidden_mD: Tensor
    g_m: Tensor  # gradient of the token's loss, accurate; 0 if the target is ignored
    rows_m: Tensor  # row of the target in this shard, -1 if another shard owns it
    target_m: Tensor  # logit of that target before softcap
    unnormalised_probs_mv: Tensor  # filled by `Kernels.exponentials` or `Kernels.dlogits`


@dataclass(frozen=True)
class Head:
    """Rows of this rank, with their group and kernels, and the options of the loss."""

    shard: VocabShard
    traffic: TokenComm
    kernels: Kernels
    objective: Objective

    def parts(
        self, chunks: Chunks, weight_vD: Tensor, targets_N: Tensor, g: float | Tensor
    ) -> Iterator[tuple[Chunk, ChunkOnShard]]:
        """Yields every chunk and its part on this shard; all share one buffer of unnormalised probabilities.

        g: the gradient of the losses, one number for all or [N]; ignored targets get 0.
        """
        targets_pL = chunks.gather(targets_N, -1)
        rows_pL = torch.where(self.shard.holds(targets_pL), self.shard.local(targets_pL), -1)
        zero = targets_pL.new_zeros((), dtype=accurate_dtype(chunks.hidden_ND.dtype))
        g_pL = torch.where(targets_pL >= 0, chunks.gather(g, 0.0) if isinstance(g, Tensor) else g, zero)
        unnormalised_probs_mv = self.kernels.empty_factors(chunks.hidden_ND, chunks.tokens, len(weight_vD))
        for chunk in chunks:
            rows_m = chunk.of(rows_pL)
            target_m = self.kernels.target_logits(chunk.hidden_mD, weight_vD, rows_m)
            probs_mv = unnormalised_probs_mv[: len(rows_m)]
            yield chunk, ChunkOnShard(chunk.mine, chunk.hidden_mD, chunk.of(g_pL), rows_m, target_m, probs_mv)

    def exponentials(self, part: ChunkOnShard, weight_vD: Tensor, gradients: bool) -> Tensor:
        """Returns this shard's statistics [k, m]; with `gradients` also fills its unnormalised probabilities."""
        return self.kernels.exponentials(
            part.hidden_mD,
            weight_vD,
            part.rows_m,
            part.target_m,
            objective=self.objective,
            unnormalised_probs_mv=part.unnormalised_probs_mv,
            gradients=gradients,
        )

    def stack(self, statistics_km: Tensor) -> Pending:
        """Sends this shard's statistics to all ranks, and will return those of all: [p, k, m]."""
        if self.objective.metrics:
            statistics_km[-1] += self.shard.start  # "best" becomes an id
        return self.traffic.stack(statistics_km)

    def merge(
        self, part: ChunkOnShard, statistics_km: Tensor, stacked_pkm: Tensor
    ) -> tuple[dict[str, Tensor], TokenFactors]:
        """Merges the statistics of all shards into `Objective.results`; returns them and the gradient's factors."""
        return self.kernels.merge(self.objective, stacked_pkm, statistics_km[0], part.target_m, part.rows_m, part.g_m)

    def recompute(self, part: ChunkOnShard, weight_vD: Tensor, lse_m: Tensor) -> tuple[Tensor, TokenFactors]:
        """Computes matmuls 1 and 2 again, now that lse is known. Returns P_r and the gradient's factors."""
        objective = self.objective
        if objective.needs_lse_first:
            self.kernels.dlogits(
                part.hidden_mD,
                weight_vD,
                part.rows_m,
                objective=objective,
                unnormalised_probs_mv=part.unnormalised_probs_mv,
                lse_m=lse_m,
            )
            target_m = objective.target_factor(part.target_m, part.rows_m, lse_m, part.g_m)
            factors = TokenFactors(part.g_m, target_m)
        else:
            shift_m = self.exponentials(part, weight_vD, gradients=True)[0]
            factors = objective.factors(shift_m, part.target_m, part.rows_m, lse_m, part.g_m)
        return self.kernels.times_weight(part.unnormalised_probs_mv, weight_vD), factors


@dataclass(frozen=True)
class RowGradient:
    """Buffer for the gradient of the rows [v, D], accurate. `new`: it is uninitialised, and is overwritten."""

    rows_vD: Tensor
    new: bool


class Gradients:
    """Gradients that add up chunk by chunk: dW in place; dX is reduced while the next work runs."""

    def __init__(self, head: Head, weight_vD: Tensor, dhidden_ND: Tensor, dweight: RowGradient) -> None:
        self.head, self.weight_vD, self.dhidden_ND, self.new = head, weight_vD, dhidden_ND, dweight.new
        self.dweight_vD, padding = dweight.rows_vD.tensor_split([len(weight_vD)])
        if self.new:
            padding.zero_()
        self.reducing: tuple[slice, Pending] | None = None
        self.smooths = head.objective.smoothing > 0 and not head.objective.needs_lse_first
        if self.smooths:
            self.weight_sum_D = weight_vD.sum(0, dtype=self.dweight_vD.dtype)
            self.hidden_sum_D = torch.zeros_like(self.weight_sum_D)

    def add(self, part: ChunkOnShard, product_mD: Tensor, factors: TokenFactors) -> None:
        """Adds one chunk. `product`: P_r; `factors`: what it lacks. Matmul 3."""
        kernels = self.head.kernels
        place = (factors.target_m, part.hidden_mD, part.rows_m)
        part_mD, scaled_mD = kernels.scale(product_mD, factors.scale_m, self.weight_vD, *place)
        if self.smooths:
            share_m = part.g_m * self.head.objective.smoothing_per_row
            part_mD.addr_(share_m, self.weight_sum_D, alpha=-1)
            self.hidden_sum_D += (part.hidden_mD * share_m.unsqueeze(1)).sum(0)
        self._store()
        self.reducing = part.mine, self.head.traffic.sum(part_mD)
        kernels.add_weight_gradient(self.dweight_vD, part.unnormalised_probs_mv, scaled_mD, *place, new=self.new)
        self.new = False

    def finish(self) -> None:
        """Waits for the last reduction; then both gradients are complete."""
        self._store()
        if self.new:  # no rank had a token
            self.dweight_vD.zero_()
        if self.smooths:
            self.dweight_vD -= self.hidden_sum_D

    def _store(self) -> None:
        if self.reducing is not None:
            mine, reduced = self.reducing
            self.dhidden_ND[mine] = reduced.wait()[: mine.stop - mine.start]
            self.reducing = None


def compute_losses(
    head: Head, chunks: Chunks, weight_vD: Tensor, targets_N: Tensor, g: float, gradients: Gradients | None
) -> dict[str, Tensor]:
    """Returns `Objective.results` of this rank's tokens, [N] each.

    `gradients`, if given, receives the gradients of g · the sum of all valid losses.
    """
    accurate = accurate_dtype(chunks.hidden_ND.dtype)
    results = {name: torch.empty_like(targets_N, dtype=accurate) for name in head.objective.results}
    deferred = gradients is not None and not head.objective.needs_lse_first
    for chunk, part in head.parts(chunks, weight_vD, targets_N, g):
        statistics_km = head.exponentials(part, weight_vD, gradients=deferred)
        stacking = head.stack(statistics_km)
        product_mD = head.kernels.times_weight(part.unnormalised_probs_mv, weight_vD) if deferred else None
        merged, factors = head.merge(part, statistics_km, stacking.wait())
        for name, merged_m in merged.items():
            results[name][chunk.mine] = head.traffic.mine(merged_m)[: chunk.mine.stop - chunk.mine.start]
        if gradients is not None:
            if product_mD is None:
                product_mD, factors = head.recompute(part, weight_vD, merged["lse"])
            gradients.add(part, product_mD, factors)
    if gradients is not None:
        gradients.finish()
    results["loss"] = torch.where(targets_N >= 0, results["loss"], 0.0)
    return results


def recompute_gradients(
    head: Head, chunks: Chunks, weight_vD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, gradients: Gradients
) -> None:
    """Adds the gradients of Σ g · loss to `gradients`, from the saved log-sum-exps. Matmul 1 runs a second time."""
    lse_pL = chunks.gather(lse_N, 0.0)
    for chunk, part in head.parts(chunks, weight_vD, targets_N, g_N.to(lse_N.dtype)):
        gradients.add(part, *head.recompute(part, weight_vD, chunk.of(lse_pL)))
    gradients.finish()

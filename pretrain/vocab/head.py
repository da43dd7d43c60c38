"""The mathematics of the loss on one shard, a chunk of tokens at a time, with the normaliser deferred.

The derivation in short; docs/how-it-works.md has it in full, in the same symbols. X [m, D] are the chunk's hidden
states, W_r [v, D] the rows of rank r, z = x · w the logits, y the target, g the factor of a token's loss.

    1. gather     X, from all ranks                                                   all-gather, one chunk ahead
    2. matmul 1   Z_r = X W_rᵀ;  a_r = max z;  s_r = Σ exp(z - a_r);  t_r = z[y], or 0 if w_y is another rank's;
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

In the code E_r is `unnormalised_probs_mv`, P_r `product_mD`, g α_r `scale_m`, g β `target_m` of `Gradients.add`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import Chunk, Chunks
from .collectives import Pending, TokenComm
from .kernels import Kernels
from .kernels.base import accurate_dtype
from .shard import VocabShard


@dataclass(frozen=True)
class ChunkOnShard:
    """One chunk of m tokens on this shard."""

    mine: slice  # this rank's tokens in the chunk
    hidden_mD: Tensor
    valid_m: Tensor  # False if the target is ignored
    rows_m: Tensor  # row of the target in this shard, -1 if another shard owns it
    target_m: Tensor  # logit of that target before softcap
    unnormalised_probs_mv: Tensor  # filled by `Kernels.exponentials` or `Kernels.dlogits`


@dataclass(frozen=True)
class Head:
    """Settings of the head, and what it works with. `metrics`: also compute entropy and the id of the largest logit."""

    shard: VocabShard
    traffic: TokenComm
    kernels: Kernels
    z_loss: float
    smoothing: float
    softcap: float | None
    metrics: bool

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the values that `merge` returns for each token."""
        return ("loss", "lse", "entropy", "best") if self.metrics else ("loss", "lse")

    @property
    def extra_statistics(self) -> tuple[str, ...]:
        """Statistics that the options need besides max, sum and the target's logit."""
        smoothing = ("logit_sum",) if self.smoothing else ()
        return (*smoothing, "weighted", "best") if self.metrics else smoothing

    @property
    def smoothing_per_row(self) -> float:
        """Amount that smoothing subtracts from the gradient of every logit."""
        return self.smoothing / self.shard.vocab_size

    @property
    def needs_lse_first(self) -> bool:
        """True with smoothing and softcap: the constant times the slope has no factor that could be applied later."""
        return self.smoothing > 0 and self.softcap is not None

    def parts(self, chunks: Chunks, weight_vD: Tensor, targets_N: Tensor) -> Iterator[tuple[Chunk, ChunkOnShard]]:
        """Yields every chunk and its part on this shard; all share one buffer of unnormalised probabilities."""
        targets_pL = chunks.gather(targets_N, -1)
        unnormalised_probs_mv = self.kernels.empty_factors(chunks.hidden_ND, chunks.tokens, len(weight_vD))
        for chunk in chunks:
            hidden_mD, targets_m = chunk.hidden_mD, chunk.of(targets_pL)
            rows_m = torch.where(self.shard.holds(targets_m), self.shard.local(targets_m), -1)
            target_m = self.kernels.target_logits(hidden_mD, weight_vD, rows_m)
            yield (
                chunk,
                ChunkOnShard(
                    chunk.mine, hidden_mD, targets_m >= 0, rows_m, target_m, unnormalised_probs_mv[: len(targets_m)]
                ),
            )

    def exponentials(self, part: ChunkOnShard, weight_vD: Tensor, gradients: bool) -> dict[str, Tensor]:
        """Returns this shard's statistics; with `gradients` also fills its unnormalised probabilities. One matmul."""
        return self.kernels.exponentials(
            part.hidden_mD,
            weight_vD,
            part.rows_m,
            part.target_m,
            softcap=self.softcap,
            unnormalised_probs_mv=part.unnormalised_probs_mv,
            extra_statistics=self.extra_statistics,
            gradients=gradients,
        )

    def stack(self, part: ChunkOnShard, statistics: dict[str, Tensor]) -> Pending:
        """Sends this shard's statistics to all ranks, and will return those of all: [p, k, m]."""
        target_m = torch.where(part.rows_m >= 0, self.cap(part.target_m), 0.0)
        if self.metrics:
            statistics["best"] = statistics["best"] + self.shard.start  # an id
        others = [statistics[name] for name in self.extra_statistics]
        return self.traffic.stack(torch.stack([statistics["max"], statistics["sum"], target_m, *others]))

    def merge(self, stacked_pkm: Tensor) -> dict[str, Tensor]:
        """Merges the statistics of all shards, in rank order, into `results`, each [m]."""
        parts = dict(zip(("max", "sum", "target", *self.extra_statistics), stacked_pkm.unbind(1), strict=True))
        max_m, winner_m = parts["max"].max(0)  # the lowest rank on ties, so the lowest id
        scale_pm = (parts["max"] - max_m).exp()
        sum_m = (parts["sum"] * scale_pm).sum(0)
        lse_m = max_m + sum_m.log()
        loss_m = lse_m - (1 - self.smoothing) * parts["target"].sum(0) + self.z_loss * lse_m.square()
        if self.smoothing:
            loss_m -= self.smoothing_per_row * parts["logit_sum"].sum(0)
        merged = {"loss": loss_m, "lse": lse_m}
        if self.metrics:
            merged["entropy"] = lse_m - (parts["weighted"] * scale_pm).sum(0) / sum_m
            merged["best"] = parts["best"].gather(0, winner_m.unsqueeze(0)).squeeze(0)
        return merged

    def recompute(self, part: ChunkOnShard, weight_vD: Tensor, lse_m: Tensor, g_m: Tensor) -> tuple[Tensor, Tensor]:
        """Computes matmuls 1 and 2 again, now that lse is known. Returns P_r and the scale of each token."""
        if self.needs_lse_first:
            self.kernels.dlogits(
                part.hidden_mD,
                weight_vD,
                part.rows_m,
                softcap=self.softcap,
                unnormalised_probs_mv=part.unnormalised_probs_mv,
                lse_m=lse_m,
                gain_m=self.z_loss_gain(lse_m),
                smoothing_per_row=self.smoothing_per_row,
            )
            scale_m = g_m
        else:
            statistics = self.exponentials(part, weight_vD, gradients=True)
            scale_m = self.deferred_scale(statistics, lse_m, g_m)
        return self.kernels.times_weight(part.unnormalised_probs_mv, weight_vD), scale_m

    def deferred_scale(self, statistics: dict[str, Tensor], lse_m: Tensor, g_m: Tensor) -> Tensor:
        """Returns the factor from exp(z - max of this shard) to the gradient of the logits; it cannot overflow."""
        return g_m * self.z_loss_gain(lse_m) * (statistics["max"] - lse_m).exp()

    def target_factor(self, part: ChunkOnShard, lse_m: Tensor, g_m: Tensor) -> Tensor:
        """Returns the gradient of the target's logit before softcap, [m]; 0 if another shard owns the target.

        Smoothing's part of it is added together with that of all other rows, except if `needs_lse_first`.
        """
        capped_m = self.cap(part.target_m)
        slope_m = 1.0 if self.softcap is None else 1 - (capped_m / self.softcap).square()
        softmax_m = self.z_loss_gain(lse_m) * (capped_m - lse_m).exp()
        smoothing_per_row = self.smoothing_per_row if self.needs_lse_first else 0.0
        return torch.where(
            part.rows_m >= 0, g_m * slope_m * (softmax_m - (1 - self.smoothing) - smoothing_per_row), 0.0
        )

    def z_loss_gain(self, lse_m: Tensor) -> Tensor:
        """Returns the factor by which z-loss multiplies the softmax's part of the gradient."""
        return 1 + 2 * self.z_loss * lse_m

    def cap(self, logit_m: Tensor) -> Tensor:
        """Applies the softcap, if there is one."""
        return logit_m if self.softcap is None else self.softcap * torch.tanh(logit_m / self.softcap)


class Gradients:
    """Gradients that add up chunk by chunk: dW in place; dX is reduced while the next work runs."""

    def __init__(self, head: Head, weight_vD: Tensor, dhidden_ND: Tensor, dweight_vD: Tensor) -> None:
        self.head, self.weight_vD, self.dhidden_ND = head, weight_vD, dhidden_ND
        self.dweight_vD = dweight_vD[: len(weight_vD)]  # without padding rows
        self.reducing: tuple[slice, Pending] | None = None
        self.smooths = head.smoothing > 0 and not head.needs_lse_first
        if self.smooths:
            self.weight_sum_D = weight_vD.sum(0, dtype=dweight_vD.dtype)
            self.hidden_sum_D = torch.zeros_like(self.weight_sum_D)

    def add(self, part: ChunkOnShard, product_mD: Tensor, scale_m: Tensor, lse_m: Tensor, g_m: Tensor) -> None:
        """Adds one chunk. `product`: P_r; `scale`: the factor that it lacks; g: the losses' gradient. Matmul 3."""
        kernels = self.head.kernels
        target_m = self.head.target_factor(part, lse_m, g_m)
        place = (target_m, part.hidden_mD, part.rows_m)
        part_mD, scaled_mD = kernels.scale(product_mD, scale_m, self.weight_vD, *place)
        if self.smooths:
            share_m = g_m * self.head.smoothing_per_row
            part_mD.addr_(share_m, self.weight_sum_D, alpha=-1)
            self.hidden_sum_D += (part.hidden_mD * share_m.unsqueeze(1)).sum(0)
        self._store()
        self.reducing = part.mine, self.head.traffic.sum(part_mD)
        kernels.add_weight_gradient(self.dweight_vD, part.unnormalised_probs_mv, scaled_mD, *place)

    def finish(self) -> None:
        """Waits for the last reduction; then both gradients are complete."""
        self._store()
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
    """Returns `head.results` of this rank's tokens, [N] each.

    `gradients`, if given, receives the gradients of g · the sum of all valid losses.
    """
    accurate = accurate_dtype(chunks.hidden_ND.dtype)
    results = {name: torch.empty_like(targets_N, dtype=accurate) for name in head.results}
    for chunk, part in head.parts(chunks, weight_vD, targets_N):
        deferred = gradients is not None and not head.needs_lse_first
        statistics = head.exponentials(part, weight_vD, gradients=deferred)
        stacking = head.stack(part, statistics)
        product_mD = head.kernels.times_weight(part.unnormalised_probs_mv, weight_vD) if deferred else None
        merged = head.merge(stacking.wait())
        for name, merged_m in merged.items():
            results[name][chunk.mine] = head.traffic.mine(merged_m)[: chunk.mine.stop - chunk.mine.start]
        if gradients is not None:
            lse_m, g_m = merged["lse"], g * part.valid_m.to(accurate)
            if product_mD is not None:
                scale_m = head.deferred_scale(statistics, lse_m, g_m)
            else:
                product_mD, scale_m = head.recompute(part, weight_vD, lse_m, g_m)
            gradients.add(part, product_mD, scale_m, lse_m, g_m)
    if gradients is not None:
        gradients.finish()
    results["loss"] = torch.where(targets_N >= 0, results["loss"], 0.0)
    return results


def recompute_gradients(
    head: Head, chunks: Chunks, weight_vD: Tensor, targets_N: Tensor, lse_N: Tensor, g_N: Tensor, gradients: Gradients
) -> None:
    """Adds the gradients of Σ g · loss to `gradients`, from the saved log-sum-exps. Matmul 1 runs a second time."""
    lse_pL = chunks.gather(lse_N, 0.0)
    g_pL = chunks.gather(torch.where(targets_N >= 0, g_N, 0.0).to(lse_N.dtype), 0.0)
    for chunk, part in head.parts(chunks, weight_vD, targets_N):
        lse_m, g_m = chunk.of(lse_pL), chunk.of(g_pL)
        product_mD, scale_m = head.recompute(part, weight_vD, lse_m, g_m)
        gradients.add(part, product_mD, scale_m, lse_m, g_m)
    gradients.finish()

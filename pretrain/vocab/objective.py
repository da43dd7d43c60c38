"""The loss of a token as a function of its statistics: pure mathematics of m numbers each.

Separate from head.py, which works on matrices, because kernels compute the same functions in one launch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenFactors:
    """Factors of a chunk's gradient, [m] each. In the derivation of head.py: g α_r, and g β."""

    scale_m: Tensor  # from the unnormalised probabilities to the gradient of the logits
    target_m: Tensor  # gradient of the target's logit before softcap; 0 if another shard owns the target


@dataclass(frozen=True)
class Objective:
    """Options of the loss. `metrics`: also compute entropy and the id of the largest logit."""

    vocab_size: int
    z_loss: float = 0.0
    smoothing: float = 0.0
    softcap: float | None = None
    metrics: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the numbers that a shard has for each token, in order.

        shift: the maximum of z, or any number that keeps sums of exp(z - shift) finite; with metrics the maximum.
        sum: Σ exp(z - shift). target: the target's z, 0 if another shard owns it. logit_sum: Σ z.
        weighted: Σ z·exp(z - shift). best: the first row of the maximum.
        """
        smoothing = ("logit_sum",) if self.smoothing else ()
        return ("shift", "sum", "target", *smoothing, *(("weighted", "best") if self.metrics else ()))

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the values that `merge` returns for each token."""
        return ("loss", "lse", "entropy", "best") if self.metrics else ("loss", "lse")

    @property
    def smoothing_per_row(self) -> float:
        """Amount that smoothing subtracts from the gradient of every logit."""
        return self.smoothing / self.vocab_size

    @property
    def needs_lse_first(self) -> bool:
        """True with smoothing and softcap: the constant times the slope has no factor that could be applied later."""
        return self.smoothing > 0 and self.softcap is not None

    def merge(self, stacked_pkm: Tensor) -> dict[str, Tensor]:
        """Merges the statistics of all shards, in rank order, into `results`, each [m]."""
        parts = dict(zip(self.statistics, stacked_pkm.unbind(1), strict=True))
        max_m, winner_m = parts["shift"].max(0)  # the lowest rank on ties, so the lowest id
        scale_pm = (parts["shift"] - max_m).exp()
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

    def factors(self, shift_m: Tensor, target_m: Tensor, rows_m: Tensor, lse_m: Tensor, g_m: Tensor) -> TokenFactors:
        """Returns the factors of an own shard with this shift. g: the gradient of the losses.

        target: the target's logit before softcap. Smoothing's part of the target's gradient is added together with that
        of all other rows.
        """
        scale_m = g_m * self.gain(lse_m) * (shift_m - lse_m).exp()  # cannot overflow: no shift exceeds lse
        return TokenFactors(scale_m, self.target_factor(target_m, rows_m, lse_m, g_m))

    def target_factor(self, target_m: Tensor, rows_m: Tensor, lse_m: Tensor, g_m: Tensor) -> Tensor:
        """Returns `TokenFactors.target_m`; it contains smoothing's part if `needs_lse_first`."""
        capped_m = self.cap(target_m)
        slope_m = 1.0 if self.softcap is None else 1 - (capped_m / self.softcap).square()
        softmax_m = self.gain(lse_m) * (capped_m - lse_m).exp()
        smoothing_per_row = self.smoothing_per_row if self.needs_lse_first else 0.0
        return torch.where(rows_m >= 0, g_m * slope_m * (softmax_m - (1 - self.smoothing) - smoothing_per_row), 0.0)

    def gain(self, lse_m: Tensor) -> Tensor:
        """Returns the factor by which z-loss multiplies the softmax's part of the gradient."""
        return 1 + 2 * self.z_loss * lse_m

    def cap(self, logit_m: Tensor) -> Tensor:
        """Applies the softcap, if there is one."""
        return logit_m if self.softcap is None else self.softcap * torch.tanh(logit_m / self.softcap)

"""Protocol of the kernels, and the functions that they share."""

from typing import Protocol

import torch
from torch import Tensor

from ..objective import Objective, TokenFactors

ALIGNMENT = 64  # elements: rows of logits start on a cache line for any size of the shard


class Kernels(Protocol):
    """Work on one chunk of m tokens and the v valid rows of this shard; v may be 0.

    "Accurate" means fp32, or float64 if hidden is. z is the logit: softcap(hidden · weight); the target's is exact.
    `rows_m` is the target's row in this shard, -1 if another shard owns it. `unnormalised_probs_mv`, the "factors",
    comes from `empty_factors`, in the compute dtype. It multiplies the weights (and hidden) in the gradients. The
    target's entry is always 0 there: rounded to bf16, p - 1 would carry nearly all of the gradient's error.
    """

    slab_bytes: int  # accurate logits that exist at once
    memory_mib: int  # default memory of a chunk; with more, this device's matmuls gain little

    def empty_factors(self, like: Tensor, m: int, v: int) -> Tensor:
        """Returns an uninitialised [m, v] like `like` for `exponentials` and `dlogits` to fill; all chunks reuse it."""
        ...

    def target_logits(self, hidden_mD: Tensor, weight_vD: Tensor, rows_m: Tensor) -> Tensor:
        """Returns hidden · weight[row] before softcap, accurate; 0 if another shard owns the row."""
        ...

    def exponentials(
        self,
        hidden_mD: Tensor,
        weight_vD: Tensor,
        rows_m: Tensor,
        target_m: Tensor,
        objective: Objective,
        unnormalised_probs_mv: Tensor,
        gradients: bool,
    ) -> Tensor:
        """Returns `objective.statistics` of z over this shard's rows, accurate, [k, m]. One matmul.

        With `gradients` it also fills factors = exp(z - shift) · dz/du (u: before softcap); else they are undefined.
        A shard without rows has a finite shift below all others, and sums of 0.
        """
        ...

    def merge(
        self, objective: Objective, stacked_pkm: Tensor, shift_m: Tensor, target_m: Tensor, rows_m: Tensor, g_m: Tensor
    ) -> tuple[dict[str, Tensor], TokenFactors]:
        """Returns what `Objective.merge` and `Objective.factors` return. shift, target and rows: of this shard."""
        ...

    def dlogits(
        self,
        hidden_mD: Tensor,
        weight_vD: Tensor,
        rows_m: Tensor,
        objective: Objective,
        unnormalised_probs_mv: Tensor,
        lse_m: Tensor,
    ) -> None:
        """Fills factors = (gain · exp(z - lse) - smoothing_per_row) · dz/du; gain: `Objective.gain`. One matmul.

        It is for objectives with `needs_lse_first`.
        """
        ...

    def times_weight(self, unnormalised_probs_mv: Tensor, weight_vD: Tensor) -> Tensor:
        """Returns factors · weight [m, D]; accurate if the device's matmul can return that."""
        ...

    def scale(
        self,
        product_mD: Tensor,
        scale_m: Tensor,
        weight_vD: Tensor,
        target_factor_m: Tensor,
        hidden_mD: Tensor,
        rows_m: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns scale · product + target_factor · weight[row], accurate, and scale · hidden in the compute dtype.

        It may overwrite the product.
        """
        ...

    def add_weight_gradient(
        self,
        gradient_vD: Tensor,
        unnormalised_probs_mv: Tensor,
        scaled_mD: Tensor,
        target_factor_m: Tensor,
        hidden_mD: Tensor,
        rows_m: Tensor,
        new: bool,
    ) -> None:
        """Adds factorsᵀ · scaled to the gradient, and target_factor · hidden to gradient[row].

        If `new`, the gradient's content is undefined, and is overwritten. The sums are accurate, in a fixed order.
        """
        ...


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums if matmuls run in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(v: int) -> int:
    """Returns v rounded up to a multiple of `ALIGNMENT`."""
    return -(-v // ALIGNMENT) * ALIGNMENT


def aligned_empty(like: Tensor, m: int, v: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an empty [m, v] whose rows start on multiples of `ALIGNMENT` elements: odd sizes keep fast matmuls.

    The gaps between the rows are 0: a CPU with AMX multiplies them by 0 in a bf16 matmul, and NaN would survive that.
    """
    whole = like.new_empty(m, aligned(v), dtype=dtype)
    whole[:, v:] = 0
    return whole[:, :v]

"""Protocol of the kernels, and the functions that they share."""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

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
        softcap: float | None,
        unnormalised_probs_mv: Tensor,
        extra_statistics: Collection[str],
        gradients: bool,
    ) -> dict[str, Tensor]:
        """Returns statistics of z over this shard's rows, accurate, [m] each. One matmul.

        With `gradients` it also fills factors = exp(z - max) · dz/du (u: before softcap); else they are undefined.
        Statistics: max; sum, Σ exp(z - max). `extra_statistics`: best, the first row of the maximum; weighted,
        Σ z·exp(z - max); logit_sum, Σ z. A shard without rows has a finite maximum below all others, and sums of 0.
        """
        ...

    def dlogits(
        self,
        hidden_mD: Tensor,
        weight_vD: Tensor,
        rows_m: Tensor,
        softcap: float | None,
        unnormalised_probs_mv: Tensor,
        lse_m: Tensor,
        gain_m: Tensor,
        smoothing_per_row: float,
    ) -> None:
        """Fills factors = (gain · exp(z - lse) - smoothing_per_row) · dz/du. One matmul.

        It is for options whose factors need the normaliser first.
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
    ) -> None:
        """Adds factorsᵀ · scaled to the gradient, and target_factor · hidden to gradient[row].

        The sums are accurate, in a fixed order.
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


def floor_statistics(hidden_mD: Tensor, extra_statistics: Collection[str]) -> dict[str, Tensor]:
    """Returns the statistics of a shard without rows: a finite floor, so that merging never subtracts infinities."""
    zero_m = hidden_mD.new_zeros(len(hidden_mD), dtype=accurate_dtype(hidden_mD.dtype))
    floor_m = torch.full_like(zero_m, torch.finfo(zero_m.dtype).min)
    return {"max": floor_m, "sum": zero_m} | dict.fromkeys(extra_statistics, zero_m)

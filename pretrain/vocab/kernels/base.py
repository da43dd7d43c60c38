"""The protocol of the kernels, and what they share."""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 64  # elements: rows of logits start on a cache line, whatever the size of the shard


class Kernels(Protocol):
    """The work on one chunk of m tokens and the v valid rows of this shard; v may be 0.

    "Accurate" is fp32, or float64 where hidden is. z is the logit: softcap(hidden · weight), the target's exact.
    `rows_m` is the target's row in this shard, -1 where another one owns it. `unnormalised_probs_mv` comes from
    `empty_factors`, in the compute dtype, and is what multiplies the weights (hidden) in the gradients; the
    target's entry is always 0 there: rounded to bf16, p - 1 would carry nearly all of the gradient's error.
    """

    slab_bytes: int  # of accurate logits at once
    memory_mib: int  # that a chunk may hold where nobody says; beyond it, this device's matmuls gain little

    def empty_factors(self, like: Tensor, m: int, v: int) -> Tensor:
        """An uninitialised [m, v] like `like`, for `exponentials` and `dlogits` to fill; all chunks reuse it."""
        ...

    def target_logits(self, hidden_mD: Tensor, weight_vD: Tensor, rows_m: Tensor) -> Tensor:
        """hidden · weight[row], accurate, before softcap; 0 where the row is not mine."""
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
        """Statistics of z over this shard's rows, accurate, [m] each; one matmul. With `gradients` also
        factors = exp(z - max) · dz/du (du: before softcap), else their content is undefined.

        max, sum: of exp(z - max). `extra_statistics`: best, the first row of the maximum; weighted, Σz·exp(z - max);
        logit_sum, Σz. A shard without rows has a finite maximum below all others, and sums of 0.
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
        """factors = (gain · exp(z - lse) - share) · dz/du; one matmul. For what cannot wait for the normaliser."""
        ...

    def times_weight(self, unnormalised_probs_mv: Tensor, weight_vD: Tensor) -> Tensor:
        """factors · weight [m, D]; accurate where the device's matmul can do that."""
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
        """scale · product + target_factor · weight[row], accurate; and scale · hidden in the compute dtype.

        May overwrite the product.
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
        """gradient += factorsᵀ · scaled; gradient[row] += target_factor · hidden. Accurate, in a fixed order."""
        ...


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that sums are held in when matmuls run in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(v: int) -> int:
    """v rounded up to `ALIGNMENT`."""
    return -(-v // ALIGNMENT) * ALIGNMENT


def aligned_empty(like: Tensor, m: int, v: int, dtype: torch.dtype | None = None) -> Tensor:
    """[m, v] whose rows start on multiples of `ALIGNMENT` elements: odd shard sizes keep the fast matmuls.

    What lies between the rows is 0: a bf16 matmul of a CPU with AMX multiplies it with 0, and NaN would stay.
    """
    whole = like.new_empty(m, aligned(v), dtype=dtype)
    whole[:, v:] = 0
    return whole[:, :v]


def floor_statistics(hidden_mD: Tensor, extra_statistics: Collection[str]) -> dict[str, Tensor]:
    """Statistics of a shard without rows: a finite floor, so that merging never subtracts infinities."""
    zero_m = hidden_mD.new_zeros(len(hidden_mD), dtype=accurate_dtype(hidden_mD.dtype))
    floor_m = torch.full_like(zero_m, torch.finfo(zero_m.dtype).min)
    return {"max": floor_m, "sum": zero_m} | dict.fromkeys(extra_statistics, zero_m)

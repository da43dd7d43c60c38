"""Kernels for CUDA: cuBLAS for the matmuls, and one Triton program per token for the rows of logits between them.

Logits are fp32, and `slab_bytes` of them exist at once; exp(z - shift) is kept, in the compute dtype. The programs also
run under Triton's interpreter (TRITON_INTERPRET=1); tests use it if there is no GPU.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..objective import Objective, TokenFactors
from . import programs
from .base import accurate_dtype, aligned, aligned_empty

SLAB_BYTES = 256 * 2**20  # of accurate logits; hundreds of tokens, enough for the matmul to fill the device
TILE = 128  # tokens that a matmul works on at once
COLUMNS = 2048  # of a row in registers at once: with 4096, fewer rows fit a multiprocessor
WARPS = 8
HIGHEST, HIGHEST_FP16 = 1e13, 6e4  # sums of exp(z - shift) above it take a new shift: none may overflow


class TritonKernels:
    """Kernels in Triton, see `Kernels`."""

    memory_mib = 896

    def __init__(self, slab_bytes: int = SLAB_BYTES, columns: int = COLUMNS) -> None:
        self.slab_bytes, self.columns = slab_bytes, columns

    def empty_factors(self, like: Tensor, m: int, v: int) -> Tensor:
        return aligned_empty(like, m, v)

    def target_logits(self, hidden_mD: Tensor, weight_vD: Tensor, rows_m: Tensor) -> Tensor:
        m, D = hidden_mD.shape
        out_m = hidden_mD.new_empty(m, dtype=accurate_dtype(hidden_mD.dtype))
        programs.target_logits[(m,)](
            hidden_mD, hidden_mD.stride(0), weight_vD, weight_vD.stride(0), rows_m, out_m, D, COLUMNS=1024
        )
        return out_m

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
        m, v = unnormalised_probs_mv.shape
        statistics_km = target_m.new_empty(len(objective.statistics), m)
        for slab, logits_sv in self._slabs(hidden_mD, weight_vD):
            programs.exponentials[(len(logits_sv),)](
                logits_sv, logits_sv.stride(0), unnormalised_probs_mv[slab], unnormalised_probs_mv.stride(0),
                statistics_km[:, slab], rows_m[slab], target_m[slab], m, v, aligned(v), SOFTCAP=objective.softcap,
                LOGIT_SUM=objective.smoothing > 0, METRICS=objective.metrics, WRITE=gradients,
                HIGHEST=HIGHEST_FP16 if hidden_mD.dtype == torch.float16 else HIGHEST, COLUMNS=self.columns,
                num_warps=WARPS,
            )  # fmt: skip
        return statistics_km

    def merge(
        self, objective: Objective, stacked_pkm: Tensor, shift_m: Tensor, target_m: Tensor, rows_m: Tensor, g_m: Tensor
    ) -> tuple[dict[str, Tensor], TokenFactors]:
        if objective.metrics or objective.needs_lse_first:
            merged = objective.merge(stacked_pkm)
            return merged, objective.factors(shift_m, target_m, rows_m, merged["lse"], g_m)
        p, k, m = stacked_pkm.shape
        loss_m, lse_m, scale_m, factor_m = target_m.new_empty(4, m)
        programs.merge[(triton.cdiv(m, TILE),)](
            stacked_pkm, shift_m, target_m, rows_m, g_m, loss_m, lse_m, scale_m, factor_m, m, p, K=k,
            Z_LOSS=objective.z_loss, SMOOTHING=objective.smoothing, SMOOTHING_PER_ROW=objective.smoothing_per_row,
            SOFTCAP=objective.softcap, TOKENS=TILE,
        )  # fmt: skip
        return {"loss": loss_m, "lse": lse_m}, TokenFactors(scale_m, factor_m)

    def dlogits(
        self,
        hidden_mD: Tensor,
        weight_vD: Tensor,
        rows_m: Tensor,
        objective: Objective,
        unnormalised_probs_mv: Tensor,
        lse_m: Tensor,
    ) -> None:
        v, gain_m = len(weight_vD), objective.gain(lse_m)
        for slab, logits_sv in self._slabs(hidden_mD, weight_vD):
            programs.dlogits[(len(logits_sv),)](
                logits_sv, logits_sv.stride(0), unnormalised_probs_mv[slab], unnormalised_probs_mv.stride(0),
                rows_m[slab], lse_m[slab], gain_m[slab], v, aligned(v), SHARE=objective.smoothing_per_row,
                SOFTCAP=objective.softcap, COLUMNS=self.columns, num_warps=WARPS,
            )  # fmt: skip

    def times_weight(self, unnormalised_probs_mv: Tensor, weight_vD: Tensor) -> Tensor:
        product_mD = weight_vD.new_empty(
            len(unnormalised_probs_mv), weight_vD.shape[1], dtype=accurate_dtype(weight_vD.dtype)
        )
        return _multiply(unnormalised_probs_mv, weight_vD, product_mD)

    def scale(
        self,
        product_mD: Tensor,
        scale_m: Tensor,
        weight_vD: Tensor,
        target_factor_m: Tensor,
        hidden_mD: Tensor,
        rows_m: Tensor,
    ) -> tuple[Tensor, Tensor]:
        m, D = hidden_mD.shape
        scaled_mD = torch.empty_like(hidden_mD, memory_format=torch.contiguous_format)
        programs.scale[(m, triton.cdiv(D, 1024))](
            product_mD, scale_m, target_factor_m, hidden_mD, hidden_mD.stride(0), weight_vD, weight_vD.stride(0),
            rows_m, scaled_mD, D, COLUMNS=1024,
        )  # fmt: skip
        return product_mD, scaled_mD

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
        if new:
            _multiply(unnormalised_probs_mv.T, scaled_mD, gradient_vD)
        else:
            _multiply_add(gradient_vD, unnormalised_probs_mv.T, scaled_mD)
        m, D = hidden_mD.shape
        sorted_rows_m, order_m = rows_m.sort(stable=True)
        programs.add_rows[(m, triton.cdiv(D, 1024))](
            gradient_vD, sorted_rows_m, order_m, target_factor_m, hidden_mD, hidden_mD.stride(0), m, D, COLUMNS=1024
        )

    def _slabs(self, hidden_mD: Tensor, weight_vD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields accurate logits, a few tokens at a time; all slabs share one buffer."""
        m, v = len(hidden_mD), len(weight_vD)
        accurate = accurate_dtype(hidden_mD.dtype)
        height = max(1, self.slab_bytes // (accurate.itemsize * max(1, v)))
        height = min(m, height if height < TILE else height // TILE * TILE)
        logits_hv = aligned_empty(hidden_mD, height, v, accurate)
        for start in range(0, m, height):
            slab = slice(start, min(start + height, m))
            yield slab, _multiply(hidden_mD[slab], weight_vD.T, logits_hv[: slab.stop - start])


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Computes out = a · b, accumulated and returned in out's dtype, which may be wider."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _multiply_add(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes out += a · b in the matmul itself: no product of out's size, and no second pass over it."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)

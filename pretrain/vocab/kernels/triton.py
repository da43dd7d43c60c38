"""Kernels for CUDA: cuBLAS for the matmuls, and one Triton program per token for the rows of logits between them.

There are no atomics: every sum has a fixed order. A row's offset is int64, because m·v can exceed 2³¹. Logits are fp32,
and `slab_bytes` of them exist at once; exp(z - max) is kept, in the compute dtype. The programs also run under Triton's
interpreter (TRITON_INTERPRET=1); tests use it if there is no GPU.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Collection, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import accurate_dtype, aligned, aligned_empty

SLAB_BYTES = 256 * 2**20  # of accurate logits; hundreds of tokens, enough for the matmul to fill the device
TILE = 128  # tokens that a matmul works on at once
COLUMNS = 4096  # of a row in registers at once
WARPS = 8
FLOOR = tl.constexpr(-3.0e38)  # below every logit, but finite: merging never subtracts infinities


@triton.jit
def _logits(logits, row, target, columns, v, wide, SOFTCAP: tl.constexpr):
    """Loads z and, with a softcap, dz/du of some columns of a row; the target's z is exact, and z = -inf beyond v.

    Rows are padded to `wide` columns, a whole number of vectors; the content of the padding is ignored.
    """
    z = tl.load(logits + columns, mask=columns < wide, other=0)
    z = tl.where(columns == row, target, tl.where(columns < v, z, 0))
    slope = z
    if SOFTCAP is not None:
        tanh = 1 - 2 / (tl.exp(z * (2 / SOFTCAP)) + 1)  # exp overflows to the right limit
        z, slope = tanh * SOFTCAP, 1 - tanh * tanh
    return tl.where(columns < v, z, -float("inf")), slope


@triton.jit
def _exponentials(
    logits, logits_stride, factors, factors_stride, statistics, rows, targets, m, v, wide,
    SOFTCAP: tl.constexpr, METRICS: tl.constexpr, WRITE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes one token's statistics [5, m] (max, sum, logit_sum, weighted, best) and its factors."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_stride
    factors += token * factors_stride
    row, target = tl.load(rows + token), tl.load(targets + token)
    lanes = tl.arange(0, COLUMNS)
    zero = tl.zeros([COLUMNS], dtype=logits.dtype.element_ty)

    largest, first = zero + FLOOR, lanes
    for start in range(0, v, COLUMNS):
        z, _ = _logits(logits, row, target, start + lanes, v, wide, SOFTCAP)
        first = tl.where(z > largest, start + lanes, first)
        largest = tl.maximum(largest, z)
    maximum = tl.max(largest, 0)
    best = tl.min(tl.where(largest == maximum, first, 2147483647), 0)

    total, logit_sum, weighted = zero, zero, zero
    for start in range(0, v, COLUMNS):
        columns = start + lanes
        z, slope = _logits(logits, row, target, columns, v, wide, SOFTCAP)
        exponential = tl.exp(z - maximum)
        total += exponential
        if METRICS:
            finite = tl.where(columns < v, z, 0)
            logit_sum += finite
            weighted += finite * exponential
        if WRITE:
            if SOFTCAP is not None:
                exponential *= slope
            factor = tl.where(columns == row, 0, exponential)
            tl.store(factors + columns, factor.to(factors.dtype.element_ty), mask=columns < wide)
    tl.store(statistics + token, maximum)
    tl.store(statistics + m + token, tl.sum(total, 0))
    if METRICS:
        tl.store(statistics + 2 * m + token, tl.sum(logit_sum, 0))
        tl.store(statistics + 3 * m + token, tl.sum(weighted, 0))
        tl.store(statistics + 4 * m + token, best.to(maximum.dtype))


@triton.jit
def _dlogits(
    logits, logits_stride, factors, factors_stride, rows, lse, z_loss_gain, v, wide,
    SHARE: tl.constexpr, SOFTCAP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes one token's (gain · exp(z - lse) - share) · dz/du, and 0 for the target."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_stride
    factors += token * factors_stride
    row, shift, z_loss_gain = tl.load(rows + token), tl.load(lse + token), tl.load(z_loss_gain + token)
    lanes = tl.arange(0, COLUMNS)
    for start in range(0, v, COLUMNS):
        columns = start + lanes
        z, slope = _logits(logits, -1, shift, columns, v, wide, SOFTCAP)
        factor = z_loss_gain * tl.exp(z - shift) - SHARE
        if SOFTCAP is not None:
            factor *= slope
        factor = tl.where(columns == row, 0, factor)
        tl.store(factors + columns, factor.to(factors.dtype.element_ty), mask=columns < wide)


@triton.jit
def _target_logits(hidden, hidden_stride, weight, weight_stride, rows, out, D, COLUMNS: tl.constexpr):
    """Computes one token's hidden · weight[row], 0 if another shard owns the row."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token)
    lanes = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=out.dtype.element_ty)
    owned = tl.where(row >= 0, D, 0)
    for start in range(0, owned, COLUMNS):
        columns = start + lanes
        x = tl.load(hidden + token * hidden_stride + columns, mask=columns < owned, other=0)
        w = tl.load(weight + row * weight_stride + columns, mask=columns < owned, other=0)
        total += x.to(total.dtype) * w.to(total.dtype)
    tl.store(out + token, tl.sum(total, 0))


@triton.jit
def _scale(
    product, scale, target_factor, hidden, hidden_stride, weight, weight_stride, rows, scaled, D,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scales one token: product = scale · product + target_factor · weight[row]; scaled = scale · hidden."""
    token = tl.program_id(0).to(tl.int64)
    row, factor, target = tl.load(rows + token), tl.load(scale + token), tl.load(target_factor + token)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < D
    sums = tl.load(product + token * D + columns, mask=mask, other=0) * factor
    w = tl.load(weight + row * weight_stride + columns, mask=columns < tl.where(row >= 0, D, 0), other=0)
    x = tl.load(hidden + token * hidden_stride + columns, mask=mask, other=0)
    tl.store(product + token * D + columns, sums + target * w.to(sums.dtype), mask=mask)
    tl.store(scaled + token * D + columns, (x.to(sums.dtype) * factor).to(scaled.dtype.element_ty), mask=mask)


@triton.jit
def _add_rows(gradient, sorted_rows, order, target_factor, hidden, hidden_stride, m, D, COLUMNS: tl.constexpr):
    """Adds target_factor · hidden to rows. The first token of a run of equal rows adds the whole run, in order."""
    position = tl.program_id(0)
    row = tl.load(sorted_rows + position)
    before = tl.load(sorted_rows + position - 1, mask=position > 0, other=-1)
    if row != before:  # also skips targets of other shards: row -1 comes first
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        mask = columns < D
        place = gradient + row * D + columns
        total = tl.load(place, mask=mask)
        current = row
        while current == row:
            token = tl.load(order + position)
            x = tl.load(hidden + token * hidden_stride + columns, mask=mask, other=0)
            total += tl.load(target_factor + token) * x.to(total.dtype)
            position += 1
            current = tl.load(sorted_rows + position, mask=position < m, other=-1)
        tl.store(place, total, mask=mask)


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
        _target_logits[(m,)](
            hidden_mD, hidden_mD.stride(0), weight_vD, weight_vD.stride(0), rows_m, out_m, D, COLUMNS=1024
        )
        return out_m

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
        m, v = unnormalised_probs_mv.shape
        names = ("max", "sum", "logit_sum", "weighted", "best")
        statistics_5m = target_m.new_empty(len(names), m)
        for slab, logits_sv in self._slabs(hidden_mD, weight_vD):
            _exponentials[(len(logits_sv),)](
                logits_sv, logits_sv.stride(0), unnormalised_probs_mv[slab], unnormalised_probs_mv.stride(0),
                statistics_5m[:, slab], rows_m[slab], target_m[slab], m, v, aligned(v), SOFTCAP=softcap,
                METRICS=len(extra_statistics) > 0, WRITE=gradients, COLUMNS=self.columns, num_warps=WARPS,
            )  # fmt: skip
        return {
            name: row
            for name, row in zip(names, statistics_5m, strict=True)
            if name in ("max", "sum", *extra_statistics)
        }

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
        v = len(weight_vD)
        for slab, logits_sv in self._slabs(hidden_mD, weight_vD):
            _dlogits[(len(logits_sv),)](
                logits_sv, logits_sv.stride(0), unnormalised_probs_mv[slab], unnormalised_probs_mv.stride(0),
                rows_m[slab], lse_m[slab], gain_m[slab], v, aligned(v), SHARE=smoothing_per_row, SOFTCAP=softcap,
                COLUMNS=self.columns, num_warps=WARPS,
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
        _scale[(m, triton.cdiv(D, 1024))](
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
    ) -> None:
        _multiply_add(gradient_vD, unnormalised_probs_mv.T, scaled_mD)
        m, D = hidden_mD.shape
        sorted_rows_m, order_m = rows_m.sort(stable=True)
        _add_rows[(m, triton.cdiv(D, 1024))](
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

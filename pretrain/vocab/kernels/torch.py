"""Kernels in plain torch, for any device, tuned for a CPU.

A CPU's low-precision matmul rounds its result, and elementwise work is bound by memory. So the logits are processed in
fp32 a slab of tokens at a time, small enough to stay in the cache. This costs a thirtieth of the three matmuls, which
leaves nothing for torch.compile to gain.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..collectives import on_host
from ..objective import Objective, TokenFactors
from .base import accurate_dtype, aligned_empty

SLAB_BYTES = 2**20  # of accurate logits: a few passes over them stay in the cache
TILE_BYTES = 2 * 2**20  # of the rounded product that is added to dW
LOG2_E = math.log2(math.e)


class TorchKernels:
    """Kernels in torch, see `Kernels`. Deterministic on a CPU; on other devices `index_add_` may not be."""

    def __init__(self, slab_bytes: int = SLAB_BYTES, memory_mib: int = 64) -> None:
        self.slab_bytes, self.memory_mib = slab_bytes, memory_mib

    def empty_factors(self, like: Tensor, m: int, v: int) -> Tensor:
        return aligned_empty(like, m, v)

    def target_logits(self, hidden_mD: Tensor, weight_vD: Tensor, rows_m: Tensor) -> Tensor:
        accurate = accurate_dtype(hidden_mD.dtype)
        owned, rows = _owned(rows_m)
        target_m = hidden_mD.new_zeros(len(hidden_mD), dtype=accurate)
        target_m[owned] = (hidden_mD[owned].to(accurate) * weight_vD[rows].to(accurate)).sum(-1)
        return target_m

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
        names, softcap = objective.statistics, objective.softcap
        statistics_km = target_m.new_zeros(len(names), len(target_m))
        if len(weight_vD) == 0:
            statistics_km[0] = torch.finfo(target_m.dtype).min
            return statistics_km
        out = dict(zip(names, statistics_km, strict=True))
        out["target"].copy_(torch.where(rows_m >= 0, objective.cap(target_m), 0.0))
        torch.mm(hidden_mD, weight_vD.T, out=unnormalised_probs_mv)
        for slab, z_sv in self._slabs(unnormalised_probs_mv):
            owned, rows = _owned(rows_m[slab])
            # a rounded logit of the target could push its loss below zero, so the exact one replaces it
            z_sv[owned, rows] = target_m[slab][owned]
            slope_sv = _cap(z_sv, softcap, slope=gradients)
            max_s = torch.amax(z_sv, 1, out=out["shift"][slab])
            if objective.smoothing:
                torch.sum(z_sv, 1, out=out["logit_sum"][slab])
            logits_sv = None
            if objective.metrics:
                out["best"][slab] = z_sv.argmax(1).to(max_s.dtype)
                logits_sv = z_sv.clone()
            _exp_(z_sv, max_s)
            torch.sum(z_sv, 1, out=out["sum"][slab])
            if logits_sv is not None:
                torch.sum(logits_sv.mul_(z_sv), 1, out=out["weighted"][slab])
            if gradients:
                if slope_sv is not None:
                    z_sv.mul_(slope_sv)
                z_sv[owned, rows] = 0
                unnormalised_probs_mv[slab] = z_sv
        return statistics_km

    def merge(
        self, objective: Objective, stacked_pkm: Tensor, shift_m: Tensor, target_m: Tensor, rows_m: Tensor, g_m: Tensor
    ) -> tuple[dict[str, Tensor], TokenFactors]:
        merged = objective.merge(stacked_pkm)
        return merged, objective.factors(shift_m, target_m, rows_m, merged["lse"], g_m)

    def dlogits(
        self,
        hidden_mD: Tensor,
        weight_vD: Tensor,
        rows_m: Tensor,
        objective: Objective,
        unnormalised_probs_mv: Tensor,
        lse_m: Tensor,
    ) -> None:
        torch.mm(hidden_mD, weight_vD.T, out=unnormalised_probs_mv)
        gain_m = objective.gain(lse_m)
        for slab, z_sv in self._slabs(unnormalised_probs_mv):
            owned, rows = _owned(rows_m[slab])
            slope_sv = _cap(z_sv, objective.softcap, slope=True)
            _exp_(z_sv, lse_m[slab]).mul_(gain_m[slab].unsqueeze(1)).sub_(objective.smoothing_per_row)
            if slope_sv is not None:
                z_sv.mul_(slope_sv)
            z_sv[owned, rows] = 0
            unnormalised_probs_mv[slab] = z_sv

    def times_weight(self, unnormalised_probs_mv: Tensor, weight_vD: Tensor) -> Tensor:
        return unnormalised_probs_mv @ weight_vD

    def scale(
        self,
        product_mD: Tensor,
        scale_m: Tensor,
        weight_vD: Tensor,
        target_factor_m: Tensor,
        hidden_mD: Tensor,
        rows_m: Tensor,
    ) -> tuple[Tensor, Tensor]:
        scale_m1 = scale_m.unsqueeze(1)
        owned, rows = _owned(rows_m)
        scaled_mD = product_mD.to(scale_m.dtype).mul_(scale_m1)
        scaled_mD[owned] += target_factor_m[owned].unsqueeze(1) * weight_vD[rows].to(scale_m.dtype)
        return scaled_mD, (hidden_mD * scale_m1).to(hidden_mD.dtype)

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
        if unnormalised_probs_mv.dtype == gradient_vD.dtype:
            torch.addmm(gradient_vD, unnormalised_probs_mv.T, scaled_mD, beta=0 if new else 1, out=gradient_vD)
        else:
            height = max(1, TILE_BYTES // (scaled_mD.shape[1] * scaled_mD.element_size()))
            for start in range(0, len(gradient_vD), height):
                tile = slice(start, start + height)
                product = unnormalised_probs_mv[:, tile].T @ scaled_mD
                if new:
                    gradient_vD[tile] = product
                else:
                    gradient_vD[tile] += product
        owned, rows = _owned(rows_m)
        values = target_factor_m[owned].unsqueeze(1) * hidden_mD[owned].to(gradient_vD.dtype)
        gradient_vD.index_add_(0, rows, values)

    def _slabs(self, logits_mv: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields a few tokens at a time, accurate: a view if the logits are accurate, else a copy."""
        m, v = logits_mv.shape
        accurate = accurate_dtype(logits_mv.dtype)
        height = max(1, self.slab_bytes // (accurate.itemsize * max(1, v)))
        for start in range(0, m, height):
            slab = slice(start, start + height)
            yield slab, logits_mv[slab].to(accurate)


def _owned(rows_m: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the positions of the targets that this shard owns, and their rows."""
    owned = on_host(rows_m >= 0).nonzero().squeeze(1).to(rows_m.device)
    return owned, rows_m[owned]


def _exp_(z_sv: Tensor, shift_s: Tensor) -> Tensor:
    """Computes exp(z - shift) in place. On a CPU exp2 takes a third of the time of exp, half of a slab's whole time."""
    return z_sv.sub_(shift_s.unsqueeze(1)).mul_(LOG2_E).exp2_()


def _cap(z_sv: Tensor, softcap: float | None, slope: bool) -> Tensor | None:
    """Caps the logits in place. Returns dz/du, or None if it is 1 or `slope` is False."""
    if softcap is None:
        return None
    z_sv.div_(softcap).tanh_()
    slope_sv = 1 - z_sv.square() if slope else None
    z_sv.mul_(softcap)
    return slope_sv

"""Kernels in plain torch, for any device, tuned for a CPU.

A CPU's low-precision matmul rounds its result, and elementwise work is bound by memory. So the logits are processed in
fp32 a slab of tokens at a time, small enough to stay in the cache. This costs a thirtieth of the three matmuls, which
leaves nothing for torch.compile to gain.
"""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..collectives import on_host
from .base import accurate_dtype, aligned_empty, floor_statistics

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
        softcap: float | None,
        unnormalised_probs_mv: Tensor,
        extra_statistics: Collection[str],
        gradients: bool,
    ) -> dict[str, Tensor]:
        if len(weight_vD) == 0:
            return floor_statistics(hidden_mD, extra_statistics)
        statistics: dict[str, list[Tensor]] = {name: [] for name in ("max", "sum", *extra_statistics)}
        torch.mm(hidden_mD, weight_vD.T, out=unnormalised_probs_mv)
        for slab, z_sv in self._slabs(unnormalised_probs_mv):
            owned, rows = _owned(rows_m[slab])
            # a rounded logit of the target could push its loss below zero, so the exact one replaces it
            z_sv[owned, rows] = target_m[slab][owned]
            slope_sv = _cap(z_sv, softcap, slope=gradients)
            max_s = z_sv.amax(1)
            statistics["max"].append(max_s)
            if "best" in extra_statistics:
                statistics["best"].append(z_sv.argmax(1).to(max_s.dtype))
            if "logit_sum" in extra_statistics:
                statistics["logit_sum"].append(z_sv.sum(1))
            logits_sv = z_sv.clone() if "weighted" in extra_statistics else None
            _exp_(z_sv, max_s)
            statistics["sum"].append(z_sv.sum(1))
            if logits_sv is not None:
                statistics["weighted"].append(logits_sv.mul_(z_sv).sum(1))
            if gradients:
                if slope_sv is not None:
                    z_sv.mul_(slope_sv)
                z_sv[owned, rows] = 0
                unnormalised_probs_mv[slab] = z_sv
        return {name: torch.cat(parts) for name, parts in statistics.items()}

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
        torch.mm(hidden_mD, weight_vD.T, out=unnormalised_probs_mv)
        for slab, z_sv in self._slabs(unnormalised_probs_mv):
            owned, rows = _owned(rows_m[slab])
            slope_sv = _cap(z_sv, softcap, slope=True)
            _exp_(z_sv, lse_m[slab]).mul_(gain_m[slab].unsqueeze(1)).sub_(smoothing_per_row)
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
    ) -> None:
        if unnormalised_probs_mv.dtype == gradient_vD.dtype:
            gradient_vD.addmm_(unnormalised_probs_mv.T, scaled_mD)
        else:
            height = max(1, TILE_BYTES // (scaled_mD.shape[1] * scaled_mD.element_size()))
            for start in range(0, len(gradient_vD), height):
                tile = slice(start, start + height)
                gradient_vD[tile] += unnormalised_probs_mv[:, tile].T @ scaled_mD
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

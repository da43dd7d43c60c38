"""Measures of the shape of all rows and of their directions, from their D × D Gram matrix."""

import torch
from torch import Tensor

from ..vocab.collectives import on_host

TOP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # fractions of the directions


def isotropy(gram_DD: Tensor, sum_D: Tensor, unit_sum_D: Tensor, n: float) -> dict[str, float]:
    """Measures n rows w, none zero, from Σ w·wᵀ, Σ w and Σ w/‖w‖, float64. Empty for fewer than two rows.

    mean_share: the part of Σ‖w‖² that lies in the mean row. mean_cosine: mean cosine of two different rows, over all
    pairs (Ethayarajh, arXiv:1909.00512). λ are the eigenvalues of the rows' covariance. effective_rank: e to the
    entropy of λ/Σλ (Roy & Vetterli, EUSIPCO 2007). isotropy: (Σλ)² / (D·Σλ²), 1 if all directions are alike.
    spectrum/topNpct: the part of Σλ in the largest N % of the directions. Solves one eigenvalue problem of size D.
    """
    if n < 2:
        return {}
    D = len(sum_D)
    mean_D = sum_D / n
    whole = float(on_host(gram_DD.trace()))
    eigenvalues_D = torch.linalg.eigvalsh(gram_DD / n - torch.outer(mean_D, mean_D)).flip(0).clamp_min(0)
    variance = float(on_host(eigenvalues_D.sum()))
    shape = {
        "mean_share": float(on_host(n * mean_D.square().sum())) / whole,
        "mean_cosine": (float(on_host(unit_sum_D.square().sum())) - n) / (n * (n - 1)),
    }
    if variance <= 0:
        return shape
    shares_D = eigenvalues_D / variance
    shape["effective_rank"] = float(on_host(torch.special.entr(shares_D).sum().exp()))
    shape["isotropy"] = 1 / (D * float(on_host(shares_D.square().sum())))
    sums_D = on_host(shares_D.cumsum(0))
    return shape | {f"spectrum/top{100 * top:g}pct": float(sums_D[max(1, round(top * D)) - 1]) for top in TOP}

"""The exact clip over both owners of gradients: the engine's body and the matrix. Apart from the optimizers: none of
them is asked, and engines need it without one.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Mesh
from ..vocab.collectives import on_host
from ..vocab.gradients import sum_of_squares


def clip_factor(body_norm: Tensor, matrix_norm: Tensor, clip: float) -> tuple[float, float]:
    """Norm of the whole gradient, and what to multiply it with so that it does not exceed `clip` (0: 1.0).

    `torch.nn.utils.clip_grad_norm_` cannot do this: it refuses DTensors of different meshes.
    """
    norm = math.hypot(float(on_host(body_norm)), float(on_host(matrix_norm)))
    return norm, min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0


def global_norm(mine: list[Tensor], mesh: Mesh) -> Tensor:
    """Norm over the tensors of all ranks, float64 scalar, the same bits on every rank. One all-reduce of a number."""
    square = sum_of_squares(mine, mesh.device)
    dist.all_reduce(square, group=mesh.flat.get_group())
    return square.sqrt()


def apply_clip(gradients: list[Tensor], factor: float) -> None:
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)

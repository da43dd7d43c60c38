"""Exact gradient clipping over body and matrix together.

Separate from the optimizers: the clip does not depend on them.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Mesh
from ..vocab.collectives import on_host
from ..vocab.gradients import sum_of_squares


def clip_factor(body_norm: Tensor, matrix_norm: Tensor, clip: float) -> tuple[float, float]:
    """Returns the norm of the whole gradient, and the factor that limits it to `clip` (1.0 if clip is 0).

    `torch.nn.utils.clip_grad_norm_` cannot do this: it does not accept DTensors of different meshes.
    """
    norm = math.hypot(*on_host(torch.stack([body_norm, matrix_norm])).tolist())  # one wait for both
    return norm, min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0


def global_norm(mine: list[Tensor], mesh: Mesh) -> Tensor:
    """Norm over the tensors of all ranks: float64 scalar, bit-identical on all ranks. One all-reduce of one number."""
    square = sum_of_squares(mine, mesh.device)
    dist.all_reduce(square, group=mesh.flat.get_group())
    return square.sqrt()


def apply_clip(gradients: list[Tensor], factor: float) -> None:
    """Multiplies the gradients by `factor`, in place."""
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)

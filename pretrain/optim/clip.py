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


def read_norm(body_norm: Tensor, matrix_norm_and_loss: Tensor) -> tuple[float, float]:
    """Returns the norm of the whole gradient, and the loss. One wait for the device.

    `torch.nn.utils.clip_grad_norm_` cannot do this: it does not accept DTensors of different meshes.
    """
    body, matrix, loss = on_host(torch.cat([body_norm.view(1), matrix_norm_and_loss])).tolist()  # one wait for all
    return math.hypot(body, matrix), loss


def clip_factor(norm: float, clip: float) -> float:
    """Returns the factor that limits a gradient of this norm to `clip`; 1.0 if clip is 0."""
    return min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0


def global_norm(mine: list[Tensor], mesh: Mesh) -> Tensor:
    """Norm over the tensors of all ranks: float64 scalar, bit-identical on all ranks. One all-reduce of one number."""
    square = sum_of_squares(mine, mesh.device)
    dist.all_reduce(square, group=mesh.flat.get_group())
    return square.sqrt()


def global_norm_and_sum(mine: list[Tensor], number: Tensor, mesh: Mesh) -> Tensor:
    """Norm as of `global_norm`, and the sum of a number over all ranks: float64 [2]. One all-reduce of two numbers."""
    both_2 = torch.stack([sum_of_squares(mine, mesh.device), number])
    dist.all_reduce(both_2, group=mesh.flat.get_group())
    both_2[:1].sqrt_()
    return both_2


def apply_clip(gradients: list[Tensor], factor: float) -> None:
    """Multiplies the gradients by `factor`, in place."""
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)

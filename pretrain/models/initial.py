"""Initial values of a body's weights. Separate from the families because most of them share the rule."""

import math

import torch
from torch import Tensor

from ..vocab.shard import seeded_normal

STD = 0.02
RESIDUAL = ".attention.out.weight", ".mlp.down.weight"  # they write to the residual stream


def initial_rows(
    shape: torch.Size, name: str, seed: int, start: int, stop: int, layers: int, std: float = STD
) -> Tensor:
    """Rows [start, stop) of the parameter's initial value, fp32, on the CPU. They do not depend on the sharding.

    Weights are normal with standard deviation `std`. The two projections per block that write to the residual stream
    are scaled by 1/sqrt(2 · layers), so that its variance does not grow with depth. Biases are 0, norm scales 1.
    """
    if name.endswith("bias"):
        return torch.zeros(stop - start)
    if len(shape) == 1:
        return torch.ones(stop - start)
    if name.endswith(RESIDUAL):
        std /= math.sqrt(2 * layers)
    return seeded_normal(name, seed, start, stop, shape[1], std)

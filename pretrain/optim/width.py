"""Factors by which initial values and steps follow the width of the model, with `optim.base_width` (muP).

Not part of base.py: engines use it for initial values, before they build an optimizer.
"""

import math
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from ..config.optim import OptimConfig


class Factors(NamedTuple):
    """Factors on initial values and settings of one parameter."""

    initial: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


SAME = Factors()
NONE: Mapping[nn.Parameter, Factors] = MappingProxyType({})  # a parameter that is missing has SAME


def body_factors(optim: OptimConfig, body: nn.Module, hidden: Container[str], whole: bool) -> dict[str, Factors]:
    """Factors of a body's parameters, by name. hidden: names of the 2-d weights of the blocks. whole: the optimizer
    steps these as matrices (Muon), not elementwise.

    With m = width / optim.base_width, as muP has it (Yang et al., arXiv:2203.03466, table 8):

    - A hidden matrix begins with 1/sqrt(m) of its deviation. AdamW's update is nearly of rank 1, so its effect grows
      with m, and the rate falls with m. Muon's update has equal singular values, which grow with sqrt(m) at the RMS
      that it matches, and so does its effect (spectral condition: Yang et al., arXiv:2310.17813). Rate · weight decay
      is unchanged (Dey et al., arXiv:2505.01618, table 1).
    - Logits have a factor 1/m. The final norm brings it: its scale begins at 1/m, and its rate falls with m, which for
      Adam equals a factor behind the norm. The logits need no factor elsewhere, and exports none at all.
    - Gradients fall with m, except those of the final norm, and so does eps.
    """
    names = [name for name, _ in body.named_parameters()]
    if optim.base_width is None:
        return dict.fromkeys(names, SAME)
    norm: nn.Module = body.norm  # type: ignore[assignment]
    m = next(norm.parameters()).shape[0] / optim.base_width
    slower = math.sqrt(m) if whole else m

    def factors(name: str) -> Factors:
        if name in hidden:
            return Factors(1 / math.sqrt(m), 1 / slower, 1 / m, slower)
        return Factors(1 / m, 1 / m) if name.startswith("norm.") else Factors(eps=1 / m)

    return {name: factors(name) for name in names}


def row_factors(optim: OptimConfig, width: int) -> Factors:
    """Factors of the rows of embedding and head: their initial values and rates do not depend on the width."""
    return SAME if optim.base_width is None else Factors(eps=optim.base_width / width)

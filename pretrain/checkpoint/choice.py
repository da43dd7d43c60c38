"""Chooses the checkpoints of an average and their factors. Not part of average.py, which needs torch."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from .folder import step_of


def chosen_steps(steps: str, folders: Sequence[Path]) -> list[Path]:
    """Returns the checkpoints, oldest first, that `steps` names: a range a..b with both ends, or a list.

    Raises ValueError if the form is wrong, a listed step has no checkpoint, or fewer than two are chosen.
    """
    found = {step_of(folder): folder for folder in folders}
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", steps)
    if ends:
        chosen = [step for step in found if int(ends[1]) <= step <= int(ends[2])]
    else:
        items = [item.strip() for item in steps.removeprefix("[").removesuffix("]").split(",")]
        if not all(item.isdecimal() for item in items):
            raise ValueError(f"steps={steps} must be a range such as 800..1000, or a list such as [600,800,1000]")
        chosen = sorted(set(map(int, items)))
        if missing := [step for step in chosen if step not in found]:
            raise ValueError(f"steps={steps}: step {missing[0]} has no checkpoint; there are {_listed(found)}")
    if len(chosen) < 2:
        raise ValueError(
            f"steps={steps} must choose at least two checkpoints; there are {_listed(found)}"
            " (a training with checkpoint.keep=0 keeps all)"
        )
    return [found[step] for step in chosen]


def factors_of(weights: str, count: int) -> list[float]:
    """Returns a factor per checkpoint, oldest first, with any sum. Raises ValueError if one is wrong."""
    if weights == "uniform":
        return [1.0] * count
    if weights == "linear":
        return [float(i) for i in range(1, count + 1)]
    try:
        factors = [float(item) for item in weights.removeprefix("[").removesuffix("]").split(",")]
    except ValueError:
        raise ValueError(f"weights={weights} must be uniform, linear, or a list such as [0.2,0.3,0.5]") from None
    if len(factors) != count:
        raise ValueError(f"weights={weights} must have {count} numbers, one for each checkpoint of steps=")
    if not all(0 <= factor < math.inf for factor in factors) or not sum(factors):
        raise ValueError(f"weights={weights} must be numbers of at least 0, not all 0")
    return factors


def _listed(steps: dict[int, Path]) -> str:
    return ", ".join(map(str, steps))

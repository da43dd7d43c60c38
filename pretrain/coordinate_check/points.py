"""Results of a coordinate check, and the verdict. Knows neither models nor pages."""

import math
from collections.abc import Iterable
from statistics import mean
from typing import NamedTuple

LOGITS = "logits"
STEEP = 0.1  # slopes beyond are named: activations of a width twice as large then differ by 7 %


class Point(NamedTuple):
    """One activation at one step."""

    step: int
    name: str
    size: float  # mean of its absolute values
    change: float  # mean absolute change since step 0


class Training(NamedTuple):
    """One training of the check."""

    width: int
    seed: int
    points: list[Point]
    losses: list[float]  # by step, nats per token


class Coordinate(NamedTuple):
    """One activation over all widths; means over the seeds."""

    name: str
    at_start: float  # slope of log(size) against log(width) before the first step
    at_end: float  # the same after the last step
    of_change: float  # slope of the change from the first to the last
    by_step: dict[int, float]  # slope of the size, by step
    sizes: dict[int, float]  # after the last step, by width
    changes: dict[int, float]

    @property
    def steep(self) -> bool:
        """True if size or change grows with the width, or shrinks, after the last step."""
        return not (abs(self.at_end) <= STEEP and abs(self.of_change) <= STEEP)  # nan is named, too


def coordinates(trainings: list[Training]) -> list[Coordinate]:
    """Joins the trainings, which have the same steps and names."""
    names = list(dict.fromkeys(point.name for point in trainings[0].points))
    steps = list(dict.fromkeys(point.step for point in trainings[0].points))

    def by_width(name: str, step: int, key: str) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for training in trainings:
            (value,) = (getattr(p, key) for p in training.points if (p.name, p.step) == (name, step))
            found.setdefault(training.width, []).append(value)
        return {width: mean(values) for width, values in sorted(found.items())}

    found = []
    for name in names:
        sizes = {step: by_width(name, step, "size") for step in steps}
        slopes, changes = {step: slope(by) for step, by in sizes.items()}, by_width(name, steps[-1], "change")
        found.append(Coordinate(name, slopes[0], slopes[steps[-1]], slope(changes), slopes, sizes[steps[-1]], changes))
    return found


def losses(trainings: list[Training]) -> dict[int, float]:
    """Mean training loss of the last tenth of the steps, by width."""
    found: dict[int, list[float]] = {}
    for training in trainings:
        found.setdefault(training.width, []).append(mean(training.losses[-max(1, len(training.losses) // 10) :]))
    return {width: mean(values) for width, values in sorted(found.items())}


def slope(sizes: dict[int, float]) -> float:
    """Slope of log(size) against log(width), by least squares; nan if a size is not positive and finite.

    >>> slope({64: 1.0, 128: 2.0, 256: 4.0})
    1.0
    """
    if not all(0 < size < math.inf for size in sizes.values()):
        return math.nan
    x, y = [math.log(width) for width in sizes], [math.log(size) for size in sizes.values()]
    a, b = mean(x), mean(y)
    return sum((u - a) * (v - b) for u, v in zip(x, y, strict=True)) / sum((u - a) ** 2 for u in x)


def verdict(found: Iterable[Coordinate]) -> list[str]:
    """Says which activations depend on the width."""
    steep = [one for one in found if one.steep]
    if not steep:
        return [f"No activation depends on the width: all slopes are within ±{STEEP} after the last step."]
    return [
        f"{one.name}: {_trend(one.at_end + one.of_change)}"
        f" (slope of the size {one.at_end:+.2f}, of the change {one.of_change:+.2f})"
        for one in steep
    ]


def _trend(slope: float) -> str:
    if math.isnan(slope):
        return "is 0 or not finite at a width"
    return f"{'grows' if slope > 0 else 'shrinks'} with the width"

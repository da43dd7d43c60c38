"""The contents of the page on a sweep: tables and curves. Knows runs, and nothing of HTML."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from . import scaling
from .differences import LEARNING_RATE, Difference, differences, label, own, value_of
from .runs import Curve, SweepRun
from .scaling import Fit, Point

COLOURS = ("blue", "orange", "green", "purple", "red", "grey")  # names of colours in data_prep/page/page.css
MOST_LINES = 2 * len(COLOURS)  # of a chart: the second half is dashed
MOST_POINTS = 200  # of a curve; more are averaged
MOST_EPOCHS = 4  # passes over the data up to which a repeated token is about as good as a new one (arXiv:2305.16264)


class Line(NamedTuple):
    """One curve of a chart."""

    name: str
    colour: str
    points: Curve
    dashed: bool = False
    quiet: bool = False  # not in the legend


class Sweep(NamedTuple):
    """The runs of a sweep, lowest loss first, and what the report says about them."""

    runs: list[SweepRun]
    silent: list[str]  # names of runs that have logged nothing
    differences: list[Difference]
    validated: bool  # losses are of the validation split; else training losses, as no run was evaluated

    def loss(self, run: SweepRun) -> float | None:
        return run.last("val_loss") if self.validated else run.training_loss

    @property
    def loss_name(self) -> str:
        return "validation loss" if self.validated else "training loss"

    @property
    def ended(self) -> list[SweepRun]:
        """Runs with a loss that are where their settings stop them."""
        return [run for run in self.runs if run.ended and self.loss(run) is not None]


def sweep_of(runs: Sequence[SweepRun], silent: list[str]) -> Sweep:
    """Sorts the runs: by validation loss, or by training loss if none has one."""
    validated = any(run.last("val_loss") is not None for run in runs)
    sweep = Sweep([], silent, differences(runs), validated)

    def order(run: SweepRun) -> tuple[float, float, str]:
        values = (sweep.loss(run), run.training_loss)
        first, second = (math.inf if value is None else value for value in values)
        return first, second, run.name

    return sweep._replace(runs=sorted(runs, key=order))


def notes(sweep: Sweep) -> Iterator[str]:
    """Yields what a reader must know before comparing the runs."""
    if not sweep.validated:
        yield "No run has a validation loss: the training loss, averaged over the last tenth of the log, is used."
    elif without := [run.name for run in sweep.runs if sweep.loss(run) is None]:
        yield f"Without a validation loss: {_listed(without)}."
    if unfinished := [run.name for run in sweep.runs if not run.ended]:
        yield f"Unfinished, and left out of all but the learning curves: {_listed(unfinished)}."
    if sweep.silent:
        yield f"Nothing logged yet: {_listed(sweep.silent)}."


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def table(sweep: Sweep) -> list[list[str]]:
    """Head and rows, lowest loss first; without columns that no run has."""
    keys = own(sweep.differences)
    head = ["val loss", *keys, "bits per byte", "training loss", "parameters", "tokens", "tokens/s", "state", "run"]
    rows = [
        [
            _number(run.last("val_loss"), ".4f"),
            *(value_of(run, key) for key in keys),
            _number(run.last("val_bits_per_byte"), ".4f"),
            _number(run.training_loss, ".4f"),
            "–" if run.parameters is None else short(run.parameters),
            short(run.tokens),
            _number(run.speed, ",.0f"),
            run.state,
            run.name,
        ]
        for run in sweep.runs
    ]
    empty = [k for k in range(len(head)) if all(row[k] == "–" for row in rows)]
    return [[cell for k, cell in enumerate(row) if k not in empty] for row in [head, *rows]]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def difference_rows(sweep: Sweep) -> list[list[str]]:
    """Head and rows: each setting that differs, its values, and the setting that it changes together with."""
    rows = [["setting", "values"]]
    for difference in sweep.differences:
        together = f"; changes together with {difference.follows}" if difference.follows else ""
        rows.append([difference.key, _listed(difference.values, most=8) + together])
    return rows


def learning_rates(sweep: Sweep) -> dict[str, Curve]:
    """Loss by learning rate, for each value of the other settings; the curve with the lowest loss first.

    Without curves of a single learning rate. Of runs with the same settings, the lowest loss counts.
    """
    if LEARNING_RATE not in own(sweep.differences):
        return {}
    others = own(sweep.differences, LEARNING_RATE)
    found: dict[str, dict[float, float]] = {}
    for run in sweep.ended:
        loss = sweep.loss(run)
        assert loss is not None
        curve = found.setdefault(label(run, others), {})
        rate = float(run.settings[LEARNING_RATE])
        curve[rate] = min(loss, curve.get(rate, math.inf))
    compared = [name for name, curve in found.items() if len(curve) > 1]
    return {name: sorted(found[name].items()) for name in sorted(compared, key=lambda name: min(found[name].values()))}


def best_rates(curves: dict[str, Curve]) -> list[list[str]]:
    """Head and rows: the best learning rate of each curve, and if the grid ends there."""
    rows = [["other settings", LEARNING_RATE, "loss", "remark"]]
    for name, curve in curves.items():
        rates = [rate for rate, _ in curve]
        best, loss = min(curve, key=lambda point: point[1])
        edge = ""
        if best in (rates[0], rates[-1]):
            edge = f"edge: try {'smaller' if best == rates[0] else 'larger'}"
        rows.append([name, f"{best:g}", f"{loss:.4f}", edge])
    return rows


def lines(curves: dict[str, Curve]) -> list[Line]:
    """The first curves, each in a colour of its own, or dashed."""
    found = []
    for k, (name, curve) in enumerate(list(curves.items())[:MOST_LINES]):
        found.append(Line(name, COLOURS[k % len(COLOURS)], curve, dashed=k >= len(COLOURS)))
    return found


def learning_curves(sweep: Sweep, key: str) -> dict[str, Curve]:
    """A value against the tokens seen, for each run that has it; lowest loss first."""
    keys = own(sweep.differences)
    names = [label(run, keys) for run in sweep.runs]
    found = {}
    for run, name in zip(sweep.runs, names, strict=True):
        if curve := thinned(run.curve(key)):
            found[name if names.count(name) == 1 else run.name] = curve
    return found


def thinned(curve: Curve) -> Curve:
    """Means of neighbours, if there are more points than the eye can tell apart. Keeps the first and last tokens."""
    each = max(1, math.ceil(len(curve) / MOST_POINTS))
    groups = [curve[k : k + each] for k in range(0, len(curve), each)]
    return [(group[-1][0], mean(value for _, value in group)) for group in groups]


def points(sweep: Sweep) -> list[Point]:
    """The runs for the scaling law: complete ones, the lowest loss of each pair of parameters and tokens."""
    found: dict[tuple[float, float], float] = {}
    for run in sweep.ended:
        loss, parameters = sweep.loss(run), run.parameters
        if run.complete and parameters is not None and loss is not None:
            pair = (float(parameters), float(run.tokens))
            found[pair] = min(loss, found.get(pair, math.inf))
    return [Point(*pair, loss) for pair, loss in sorted(found.items())]


def repeats(sweep: Sweep) -> Iterator[str]:
    """Yields a warning if runs of the scaling law have repeated their data too often."""
    often = [run.name for run in sweep.ended if run.complete and (run.last("epochs") or 0) > MOST_EPOCHS]
    if often:
        yield f"More than {MOST_EPOCHS} passes over the data, so D counts repeated tokens as new: {_listed(often)}."


def law_rows(fit: Fit) -> list[list[str]]:
    """Head and rows: the constants and their intervals."""
    rows = [["constant", "value", f"{scaling.LOW} % to {scaling.HIGH} %"]]
    for name, value in fit.law._asdict().items():
        low, high = fit.interval([getattr(law, name) for law in fit.resampled])
        rows.append([name, f"{value:.4g}", f"{low:.4g} to {high:.4g}"])
    return rows


def optimum_rows(fit: Fit, measured: Sequence[Point], budget: float | None) -> list[list[str]]:
    """Head and rows: the best N and D for a budget in FLOPs, or for 1, 10 and 100 times that of the largest run."""
    largest = max(scaling.FLOPS * point.parameters * point.tokens for point in measured)
    budgets = [largest, 10 * largest, 100 * largest] if budget is None else [budget]
    rows = [["FLOPs", "× largest run", "N", f"{scaling.LOW} % to {scaling.HIGH} %", "D", "D / N", "loss"]]
    for flops in budgets:
        parameters, tokens = fit.law.optimum(flops)
        others = [law.optimum(flops)[0] for law in fit.resampled if min(law.alpha, law.beta) > 0]
        low, high = fit.interval(others)
        loss = fit.law.loss(parameters, tokens)
        cells = [f"{flops:.2e}", f"{flops / largest:,.3g}", short(parameters), f"{short(low)} to {short(high)}"]
        rows.append([*cells, short(tokens), f"{tokens / parameters:,.3g}", f"{loss:.4f}"])
    return rows


def fitted_rows(fit: Fit, measured: Sequence[Point]) -> list[list[str]]:
    """Head and rows: the measured and the fitted losses."""
    rows = [["parameters N", "tokens D", "loss", "fitted", "difference"]]
    for point in measured:
        fitted = fit.law.loss(point.parameters, point.tokens)
        difference = f"{fitted / point.loss - 1:+.2%}".replace("-", "−")
        rows.append([short(point.parameters), short(point.tokens), f"{point.loss:.4f}", f"{fitted:.4f}", difference])
    return rows


def law_lines(fit: Fit, measured: Sequence[Point], x: str, other: str) -> list[Line]:
    """Loss against `x` for each value of `other`, measured and, dashed, fitted."""
    values = sorted({getattr(point, other) for point in measured}, reverse=True)[: len(COLOURS)]
    along = sorted({getattr(point, x) for point in measured})
    grid = [along[0] * (along[-1] / along[0]) ** (k / 40) for k in range(41)]
    found = []
    for value, colour in zip(values, COLOURS, strict=False):
        own = sorted((getattr(point, x), point.loss) for point in measured if getattr(point, other) == value)
        curve = [(at, fit.law.loss(**{x: at, other: value})) for at in grid]
        name = f"{short(value)} {other}"
        found += [Line(name, colour, own), Line(f"{name}, fitted", colour, curve, dashed=True, quiet=True)]
    return found


def short(value: float) -> str:
    """A number with three digits: 1.25M."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}" if value < 1e3 * unit else f"{value / unit:,.0f}{letter}"
    return f"{value:.3g}"


def facts(sweep: Sweep, folder: Path) -> list[tuple[str, str]]:
    """Names and texts for the head of the page."""
    best = sweep.runs[0]
    loss = sweep.loss(best)
    ended = sum(run.ended for run in sweep.runs)
    found = [("folder", str(folder)), ("runs", f"{len(sweep.runs)} ({ended} have ended)")]
    if loss is not None:
        found += [("best run", best.name), (f"its {sweep.loss_name}", f"{loss:.4f}")]
    return [*found, ("settings that differ", ", ".join(own(sweep.differences)) or "none")]

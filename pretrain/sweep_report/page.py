"""The page of a sweep: one HTML file with tables and charts, which needs no network.

Separate from the report, which knows runs and nothing of HTML.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import page as html

from . import report, scaling
from .report import MOST_LINES, Line, Sweep
from .scaling import Fit, Point

SCRIPT = "charts();\nthemed();\n"
LAW = "L(N, D) = E + A / N^alpha + B / D^beta"
METHOD = (
    f"{LAW}, with N parameters (the matrix included), D tokens and L nats per token. Hoffmann et al. 2022"
    " (arXiv:2203.15556), approach 3: the sum of Huber losses of log L is minimised. The intervals come from"
    f" {scaling.RESAMPLES} samples of the runs with replacement."
)
OPTIMUM = (
    "The N and D with the lowest loss for a budget of 6·N·D FLOPs. Far beyond the largest run this is an extrapolation:"
    " check it with a run in between."
)


def page(sweep: Sweep, folder: Path, fitted: Fit | None, why: str, budget: float | None) -> str:
    """The whole page. fitted: the scaling law, or None, and `why` there is none."""
    charts: dict[str, list[dict[str, Any]]] = {}
    title = f"Sweep {folder.resolve().name}"
    rows = report.table(sweep)
    last = len(rows[0]) - 1  # the column of names
    parts = [
        html.header(title),
        "<main>",
        html.facts(report.facts(sweep, folder)),
        *(html.note(line, "warning") for line in report.notes(sweep)),
        html.section("Runs", html.note(f"By {sweep.loss_name}, the lowest first."), html.table(rows, long=last)),
        _settings(sweep),
        _rates(sweep, charts),
        _curves(sweep, charts),
        _law(sweep, fitted, why, budget, charts),
        "</main>",
    ]
    return html.page(title, "\n".join(filter(None, parts)), {"charts": charts}, SCRIPT)


def spec(title: str, note: str, lines: Sequence[Line], x: str, log_y: bool = False) -> dict[str, Any]:
    """A chart as the page's script takes it. The x axis is logarithmic."""
    return {
        "title": title,
        "note": note,
        "x": {"label": x, "log": True},
        "y": {"log": log_y, "digits": 5},
        "bars": False,
        "lines": [line._asdict() for line in lines],
    }


def _settings(sweep: Sweep) -> str:
    rows = report.difference_rows(sweep)
    if len(rows) == 1:
        return html.section("Settings that differ", html.note("None that can change a loss."))
    note = (
        "A setting that changes together with another has one value for each value of it: the runs cannot tell their"
        " effects apart. Settings that cannot change a loss are left out."
    )
    return html.section("Settings that differ", html.note(note), html.table(rows, long=1))


def _rates(sweep: Sweep, charts: dict[str, list[dict[str, Any]]]) -> str:
    curves = report.learning_rates(sweep)
    if not curves:
        why = "No two finished runs differ in optim.lr alone: give several with --multirun optim.lr=A,B,C."
        return html.section("Loss against learning rate", html.note(why))
    note = f"{sweep.loss_name} at the end, one curve per value of the other settings{_some(curves)}"
    charts["Learning rate"] = [spec("Loss against learning rate", note, report.lines(curves), "optim.lr")]
    best = html.table(report.best_rates(curves), "The best learning rate of each curve", long=0)
    return html.section("Learning rate", html.beside(html.charts("Learning rate"), best))


def _curves(sweep: Sweep, charts: dict[str, list[dict[str, Any]]]) -> str:
    drawn = []
    for key, title in (("loss", "Training loss"), ("val_loss", "Validation loss")):
        if curves := report.learning_curves(sweep, key):
            note = f"nats per token{_some(curves)}"
            drawn.append(spec(title, note, report.lines(curves), "tokens seen", log_y=True))
    charts["Learning curves"] = drawn
    return html.section("Learning curves", html.charts("Learning curves"))


def _some(curves: dict[str, Any]) -> str:
    """Says that not all curves are drawn, if so."""
    return f"; the {MOST_LINES} lowest of {len(curves)}" if len(curves) > MOST_LINES else ""


def _law(sweep: Sweep, fitted: Fit | None, why: str, budget: float | None, charts: dict[str, Any]) -> str:
    if fitted is None:
        return html.section("Scaling law", html.note(why))
    measured: list[Point] = report.points(sweep)
    charts["Scaling law"] = [
        spec("Loss against parameters", "one curve per number of tokens; dashed: fitted",
             report.law_lines(fitted, measured, "parameters", "tokens"), "parameters N"),
        spec("Loss against tokens", "one curve per number of parameters; dashed: fitted",
             report.law_lines(fitted, measured, "tokens", "parameters"), "tokens D"),
    ]  # fmt: skip
    error = f"Fitted to {len(measured)} runs; the fitted losses are off by {fitted.error:.2%} (root mean square)."
    if fitted.doubt:
        use = html.note(f"No best size for a budget: {fitted.doubt}.", "warning")
    else:
        use = html.note(OPTIMUM) + html.table(
            report.optimum_rows(fitted, measured, budget), "Best N and D for a budget"
        )
    return html.section(
        "Scaling law",
        html.note(METHOD),
        html.note(error),
        *(html.note(line, "warning") for line in report.repeats(sweep)),
        html.beside(html.table(report.law_rows(fitted), "Constants"), use),
        html.charts("Scaling law"),
        "<details><summary>Measured and fitted losses</summary>"
        + html.table(report.fitted_rows(fitted, measured))
        + "</details>",
    )

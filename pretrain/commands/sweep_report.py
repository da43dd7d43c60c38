"""Compares the runs of a sweep on one page: `python -m pretrain.sweep_report --help`."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from data_prep import terminal
from data_prep.arguments import key_values
from data_prep.columns import aligned
from data_prep.command import arguments_or, one_line
from data_prep.durable import durable
from data_prep.progress import working

from ..sweep_report import report, scaling
from ..sweep_report.page import LAW, page
from ..sweep_report.report import Sweep
from ..sweep_report.runs import read_runs
from ..sweep_report.scaling import Fit, Point

HELP = """What does the sweep tell? Compares all runs below a folder on one page, which needs no network.

  python -m pretrain.sweep_report runs=runs/lr out=sweep.html
  python -m pretrain.sweep_report runs=runs/sizes budget=1e21

The page has the settings that differ, the runs by validation loss, the loss against the learning rate, the learning
curves, and a scaling law, if there are enough runs of different sizes and lengths: at least 9 finished ones, with 3
numbers of parameters and 3 of tokens. The fit needs scipy. Default: out=sweep_report.html

Runs come from --multirun of launch/local.py and launch/slurm.py, or from any commands that train below one folder.
"""
KEYS = {
    "runs": "folder with the runs, at any depth",
    "out": "HTML file to write; default: sweep_report.html",
    "budget": "FLOPs, such as 1e21, for the best size by the law; default: 1, 10 and 100 times the largest run's",
}


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if the command is wrong."""
    with one_line():
        given = key_values(arguments_or(HELP), KEYS, "runs=, out= or budget=")
        if not given.get("runs"):
            raise ValueError("runs is missing: name a folder with runs in it, such as runs=runs/lr")
        folder, out = Path(given["runs"]), Path(given.get("out") or "sweep_report.html")
        if out.is_dir():
            raise ValueError(f"out={out} is a folder: name a file, such as out={out / 'sweep.html'}")
        if not out.parent.is_dir():
            raise ValueError(f"out={out} must be in a folder that exists: {out.parent} does not")
        budget = flops_of(given.get("budget"))
        sweep = report.sweep_of(*read_runs(folder))
        fitted, why = fit_of(report.points(sweep))
        with durable(out) as file:
            file.write(page(sweep, folder, fitted, why, budget).encode())
        terminal.product()
        print("\n".join([*said(sweep, fitted, why, budget), f"page: {out}"]))


def flops_of(text: str | None) -> float | None:
    """Reads a number of FLOPs. Raises ValueError if it is not positive."""
    if not text:
        return None
    try:
        flops = float(text)
    except ValueError:
        flops = 0.0
    if not 0 < flops < float("inf"):
        raise ValueError(f"budget={text} must be a positive number of FLOPs, such as 1e21")
    return flops


def fit_of(points: list[Point]) -> tuple[Fit | None, str]:
    """Fits the scaling law. Returns the fit and "", or None and the reason why there is no fit."""
    if lacking := scaling.missing(points):
        return None, lacking
    if find_spec("scipy") is None:
        return None, "The fit of a scaling law needs scipy: pip install scipy, or the extra `sweep` of this package."
    with working("fit the scaling law"):
        return scaling.fit(points), ""


def said(sweep: Sweep, fitted: Fit | None, why: str, budget: float | None) -> Iterator[str]:
    """Yields the lines for the terminal."""
    yield from report.notes(sweep)
    yield from aligned(report.table(sweep), left=(-1,))
    if rates := report.learning_rates(sweep):
        yield from ["", *aligned(report.best_rates(rates), left=(0, -1))]
    if fitted is None:
        yield from ["", f"No scaling law. {why}"]
        return
    yield from ["", f"{LAW}, fitted to {len(report.points(sweep))} runs:", *aligned(report.law_rows(fitted))]
    yield from report.repeats(sweep)
    if fitted.doubt:
        yield f"No best size for a budget: {fitted.doubt}."
    else:
        yield from ["", *aligned(report.optimum_rows(fitted, report.points(sweep), budget))]


if __name__ == "__main__":
    main()

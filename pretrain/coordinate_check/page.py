"""The page of a coordinate check: one HTML file with tables and charts, which needs no network."""

import math
from collections.abc import Sequence
from typing import Any

from data_prep import page as html

from .points import Coordinate

COLOURS = ("blue", "orange", "green", "purple", "red", "grey")  # names of colours in data_prep/page/page.css
SCRIPT = "charts();\nthemed();\n"
METHOD = (
    "The same model was trained at several widths on the same batches. Each number is the mean absolute value of an"
    " activation on one text. The slope is that of log(size) against log(width): 0 if it does not depend on the width,"
    " 1 if it doubles with the width. With hyperparameters that carry over between widths, sizes and changes after the"
    " last step do not depend on the width (Yang et al., arXiv:2203.03466)."
)


def table(found: Sequence[Coordinate], losses: dict[int, float]) -> list[list[str]]:
    """A row per activation: its slopes, and its size at each width; and the losses."""
    head = ["activation", "slope at the start", "slope at the end", "slope of the change", *map(str, losses)]
    rows = [
        [one.name, *(f"{x:+.2f}" for x in one[1:4]), *(f"{size:.4g}" for size in one.sizes.values())] for one in found
    ]
    return [head, *rows, ["training loss", "", "", "", *(f"{loss:.4f}" for loss in losses.values())]]


def page(
    title: str, facts: list[tuple[str, str]], verdict: list[str], found: Sequence[Coordinate], losses: dict[int, float]
) -> str:
    """The whole page."""
    charts = {
        "Activations": [
            _chart("Size after the last step", found, "sizes", "width"),
            _chart("Change from the first to the last step", found, "changes", "width"),
            _chart("Slope of the size against the width", found, "by_step", "step"),
        ]
    }
    body = [
        html.header(title),
        "<main>",
        html.facts(facts),
        *(html.note(line, "warning" if any(one.steep for one in found) else "soft") for line in verdict),
        html.section("Activations by width", html.note(METHOD), html.table(table(found, losses))),
        html.section("Charts", html.charts("Activations")),
        "</main>",
    ]
    return html.page(title, "\n".join(body), {"charts": charts}, SCRIPT)


def _chart(title: str, found: Sequence[Coordinate], key: str, x: str) -> dict[str, Any]:
    """A chart with a line per activation; by width, both axes are logarithmic."""
    log = x == "width"
    lines = [
        {
            "name": one.name,
            "colour": COLOURS[i % len(COLOURS)],
            "points": [[at, y] for at, y in getattr(one, key).items() if math.isfinite(y) and (y > 0 or not log)],
            "dashed": i // len(COLOURS) % 2 == 1,
            "quiet": i >= 2 * len(COLOURS),
        }
        for i, one in enumerate(reversed(found))
    ]
    return {
        "title": title,
        "note": "mean absolute value" if log else "0: it does not depend on the width",
        "x": {"label": x, "log": log},
        "y": {"log": log, "digits": 4},
        "bars": False,
        "lines": lines,
    }

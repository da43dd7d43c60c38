"""The page of two runs: one HTML file with summary, tables and charts, which needs no network.

Separate from the report, which knows runs and nothing of HTML.
"""

from typing import Any

from data_prep import page as html

from .report import FREQUENCIES, NOTES, Chart, facts, sections, summary, warnings
from .run import ReportRun

AXES: dict[str, dict[str, Any]] = {
    "tokens": {"label": "tokens seen", "log": False},
    "bins": {"label": "uses of a row, per million", "log": False, "ticks": list(enumerate(FREQUENCIES))},
    "% of directions": {"label": "% of directions", "log": False},
}
SCRIPT = "charts();\nthemed();\n"


def page(tied: ReportRun, untied: ReportRun) -> str:
    """The whole page."""
    title = f"Tied and untied: {tied.folder.name} and {untied.folder.name}"
    parts = [html.header("A tied and an untied run"), "<main>", html.facts(summary(tied, untied))]
    parts += [html.note(line, "warning") for line in warnings(tied, untied)]
    rows = [["", "tied", "untied", "untied − tied"], *facts(tied, untied)]
    parts += [html.section("Result", html.beside(html.table(rows), "".join(map(html.note, NOTES))))]
    charts = {}
    for part in sections(tied, untied):
        charts[part.title] = [spec(chart) for chart in part.charts]
        place = html.charts(part.title) if part.charts else ""
        odd = html.table([["rows that stand out", "count", "ids and tokens"], *part.rows], long=2) if part.rows else ""
        parts.append(html.section(part.title, html.note(part.note), place, odd))
    return html.page(title, "\n".join([*parts, "</main>"]), {"charts": charts}, SCRIPT)


def spec(chart: Chart) -> dict[str, Any]:
    """A chart as the page's script takes it."""
    return {
        "title": chart.title,
        "note": chart.note,
        "x": AXES[chart.x],
        "y": {"log": chart.log},
        "bars": False,
        "lines": [line._asdict() for line in chart.lines],
    }

"""The page of two runs: HTML that needs nothing from outside, its charts drawn by matplotlib as SVG.

Stands apart from the report: that knows runs, and nothing of HTML or pictures.
"""

from html import escape
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .report import FREQUENCIES, NOTES, Chart, facts, sections, warnings
from .run import ReportRun

COLUMNS = 3  # charts side by side
STYLE = """
body { font: 13px/1.4 system-ui, sans-serif; margin: 16px auto; padding: 0 16px; max-width: 1320px; color: #222; }
h1 { font-size: 17px; } h2 { font-size: 15px; } p { max-width: 900px; } svg { max-width: 100%; height: auto; }
.warning { color: #a40000; }
table { border-collapse: collapse; } th, td { text-align: right; padding: 3px 10px; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child, .text td { text-align: left; }
"""


def page(tied: ReportRun, untied: ReportRun) -> str:
    """The whole page."""
    title = escape(f"Tied and untied: {tied.folder} and {untied.folder}")
    parts = [f"<h1>{title}</h1>", *(f'<p class="warning">{escape(line)}</p>' for line in warnings(tied, untied))]
    parts += [_table([["", "tied", "untied", "untied − tied"], *facts(tied, untied)])]
    parts += [f"<p>{escape(note)}</p>" for note in NOTES]
    for section in sections(tied, untied):
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.note)}</p>"]
        parts += [picture(section.charts)] if section.charts else []
        parts += [_table([["at the last look", "rows", ""], *section.rows], "text")] if section.rows else []
    head = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>'
    return "\n".join([head, *parts, "</html>\n"])


def _table(rows: list[list[str]], kind: str = "") -> str:
    """An HTML table; the first row is its head."""
    tags = ["th"] + ["td"] * (len(rows) - 1)
    cells = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=True))
    return f'<table class="{kind}">\n' + "\n".join(f"<tr>{row}</tr>" for row in cells) + "\n</table>"


def picture(charts: list[Chart]) -> str:
    """An SVG with all charts."""
    rows = -(-len(charts) // COLUMNS)
    figure = Figure(figsize=(13, 3 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    all_axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes, chart in zip(all_axes, charts, strict=False):
        _draw(axes, chart)
    for axes in all_axes[len(charts) :]:
        axes.remove()
    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tie"}):  # text stays text, ids stay the same
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw(axes: Axes, chart: Chart) -> None:
    axes.set_title(f"{chart.title}\n", loc="left", fontsize=10, fontweight="bold")
    axes.text(0, 1.03, chart.note, transform=axes.transAxes, fontsize=8, color="#555555")
    for line in chart.lines:
        x, y = zip(*line.points, strict=True)
        marker, style = "." if len(x) < 40 else "", "--" if line.dashed else "-"
        axes.plot(x, y, style, color=line.colour, marker=marker, label=line.name, gid=f"{chart.title}: {line.name}")
    if chart.log:
        axes.set_yscale("log")
    if chart.x == "bins":
        axes.set_xticks(range(len(FREQUENCIES)), FREQUENCIES)
    elif chart.x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("uses of a row, of a million" if chart.x == "bins" else chart.x, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)

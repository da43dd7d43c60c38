"""Draws docs/head.png and docs/scaling.png from the tables of docs/benchmarks.md, and docs/scale.png by scale.py.

    python tests/benchmarks/pictures.py

A picture of measurements shows the figures of the page and nothing else: measure, paste the tables, draw.
"""

import re
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from launch.hardware import GIB
from tests.benchmarks.scale import ROWS, SYSTEMS, training_of
from tests.benchmarks.scale_model import fastest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "benchmarks.md"
OURS, LIMIT = "Rowshard", "three bare matmuls"
COLORS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]  # told apart by colour-blind readers
MARKERS = ["o", "s", "^", "D", "v", "P"]
Table = list[list[str]]


def main() -> None:
    """Prints the path of each picture."""
    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    for path in (head(), scaling(), scale()):
        print(path)


def tables(title: str) -> list[tuple[str, Table]]:
    """Returns the tables below a heading of the page: the text before each, and its rows, header first."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(r"([^\n]+)\n\n((?:\|[^\n]*\n)+)", section)
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()] for _, rows in found]
    return [(text, [rows[0], *rows[2:]]) for (text, _), rows in zip(found, cells, strict=True)]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def head() -> Path:
    """Draws time and memory of the head against the rows of the vocabulary."""
    found = tables("Over the vocabulary")
    sizes = [number(re.search(r"([\d,]+) rows", text)[1]) for text, _ in found]  # type: ignore[index]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    names = [row[0] for row in found[0][1][1:]]
    for name, color, marker in zip(names, colors(names), cycle(MARKERS), strict=False):
        rows = [next(row for row in table if row[0] == name) for _, table in found]
        line(time, sizes, [number(row[2]) for row in rows], name, color, marker)
        line(memory, sizes, [number(row[3]) / 1024 for row in rows], name, color, marker)
    for axes, title in ((time, "time, as a multiple of three bare matmuls"), (memory, "extra peak memory, GiB")):
        axes.set(xscale="log", yscale="log", xlabel="rows of the vocabulary", title=title)
        ticks(axes.xaxis, sizes, "{:,.0f}")
        axes.grid(alpha=0.3)
    ticks(time.yaxis, [1, 1.25, 1.5, 2, 2.5, 3], "{:g}")
    ticks(memory.yaxis, [0.125, 0.25, 0.5, 1, 2, 4, 8], "{:g}")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return saved(figure, "head.png")


def scaling() -> Path:
    """Draws memory per rank against the ranks."""
    text, (header, *rows) = tables("Memory over the ranks")[0]
    ranks = [number(row[0]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8.5, 4.4), layout="constrained")
    for column, (name, color, marker) in enumerate(
        zip(header[1:], colors(header[1:]), cycle(MARKERS), strict=False), 1
    ):
        line(axes, ranks, [number(row[column]) / 1024 for row in rows], name, color, marker)
    axes.set(xscale="log", xlabel="ranks", ylim=(0, None), title="peak memory per rank, GiB; the same tokens per rank")
    ticks(axes.xaxis, ranks, "{:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.text(0, -0.22, text.removesuffix("; peak MiB per rank"), transform=axes.transAxes, fontsize=9, color="0.35")
    return saved(figure, "scaling.png")


def scale() -> Path:
    """Draws the simulated speed and memory per GPU against the ranks, for each vocabulary; a gap does not fit."""
    ranks = [2**k for k in range(3, 13)]
    figure, grid = pyplot.subplots(2, len(ROWS), figsize=(11, 7.6), layout="constrained", sharex=True, sharey="row")
    for (speed, memory), rows in zip(grid.T, ROWS, strict=True):
        for (name, points_of), color, marker in zip(SYSTEMS.items(), colors(list(SYSTEMS)), cycle(MARKERS)):
            points = {world: fastest(points_of(training_of(rows, world))) for world in ranks}
            fitting = {world: point for world, point in points.items() if point is not None}
            line(speed, list(fitting), [point.rate for point in fitting.values()], name, color, marker)
            line(memory, list(fitting), [point.memory / GIB for point in fitting.values()], name, color, marker)
        speed.set(title=f"tokens/s per GPU, {rows:,} rows", xscale="log")
        memory.set(title=f"memory per GPU, GiB, {rows:,} rows", xlabel="GPUs")
        ticks(memory.xaxis, [world for world in ranks if world.bit_length() % 3 == 1], "{:,.0f}")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_ylim(0, None)  # once all is drawn: the axes of a row share it
    figure.suptitle("simulated, not measured: llama_8b, untied, 8,192 tokens per GPU and step", fontsize=11)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return saved(figure, "scale.png")


def colors(names: list[str]) -> list[str]:
    rivals = iter(COLORS[1:])
    return [COLORS[0] if name == OURS else "0.45" if name == LIMIT else next(rivals) for name in names]


def line(axes: Any, x: list[float], y: list[float], name: str, color: str, marker: str) -> None:
    """Draws one system. Equal figures stay visible: markers are hollow, and a later line is thinner."""
    ours = name == OURS
    width = 5.0 if ours else max(1.2, 3.6 - 0.8 * len(axes.lines))
    axes.plot(x, y, label=name, color=color, linewidth=width, linestyle="--" if name == LIMIT else "-", alpha=0.9)
    fill = color if ours else "none"
    axes.lines[-1].set(marker=marker, markersize=8, markerfacecolor=fill, markeredgewidth=1.6)


def ticks(axis: Any, values: list[float], pattern: str) -> None:
    axis.set_ticks(values, [pattern.format(value) for value in values])
    axis.set_ticks([], minor=True)


def saved(figure: Any, name: str) -> Path:
    figure.savefig(DOCS / name, dpi=150)
    return DOCS / name


if __name__ == "__main__":
    main()

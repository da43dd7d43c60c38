"""The pictures: a PNG of each view, and one HTML page of all of them."""

import textwrap
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import StrMethodFormatter

from data_prep.durable import durable

from .page import page
from .views import COLOURS, Heatmap, LensTable

WIDTH, DPI = 9.2, 150  # inches; 1,380 pixels, which documents show at about 60 %
BAND = 12  # the most columns side by side with their texts; more go below
CELL, LINE = 0.3, 0.2  # inches: height of a cell, of a line of text
LETTERS = 9  # of a token that fit a cell
MOST_WRITTEN = 96  # positions; a longer picture has colours alone
MOST_COLUMNS = 4096  # positions of a page
INK, SOFT = "#1d2126", "#565d66"
FONT = "DejaVu Sans Mono"
TOKEN: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "family": FONT, "parse_math": False}


def write_pictures(shown: LensTable, folder: Path) -> list[Path]:
    """Writes one PNG per view into `folder`, named by its key, and the page; returns their paths in this order.

    Everything is drawn before the first file is written, and each file is written whole or not at all. Raises OSError
    if a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for heatmap in shown.views:
        picture = BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in the picture; the page has the text
            draw(shown, heatmap).savefig(picture, dpi=DPI)
        files[folder / f"{heatmap.key}.png"] = picture.getvalue()
    files[folder / "lens.html"] = page(shown).encode()
    for path, content in files.items():
        with durable(path) as file:
            file.write(content)
    return list(files)


def draw(shown: LensTable, heatmap: Heatmap) -> Figure:
    """Draws the input layer below and the output on top; a long text goes on in bands below each other."""
    R, N = heatmap.values.shape
    written = N <= MOST_WRITTEN
    bands = -(-N // BAND) if written else 1
    width = -(-N // bands)
    texts = 3 * LINE if written else 2 * LINE
    head, band, legend = 0.75, texts + (CELL * R if written else max(2.0, 0.16 * R)), 0.7
    height = head + legend + band * bands + 0.12 * (bands - 1)
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    left = (0.15 + 0.085 * max(map(len, (*shown.layers, "next token")))) / WIDTH
    right = 1 - (0.15 if written else 0.3) / WIDTH
    norm = LogNorm(heatmap.low, heatmap.high) if heatmap.log else Normalize(heatmap.low, heatmap.high)
    colours = ScalarMappable(norm, _map(heatmap))
    for k, start in enumerate(range(0, N, width)):
        columns = range(start, min(start + width, N))
        top = height - head - k * (band + 0.12) - (LINE if written else 0)
        box = (left, (top - band + texts) / height, (right - left) * len(columns) / width, (band - texts) / height)
        axes = figure.add_axes(box)
        values = np.clip(heatmap.values[:, columns.start : columns.stop], heatmap.low, heatmap.high)
        axes.imshow(values, _map(heatmap), norm, aspect="auto", origin="lower", interpolation="nearest")
        _label(axes, shown, columns, written)
        if written:
            _write_guesses(axes, shown, columns, colours.to_rgba(values))
    _head(figure, shown, heatmap)
    bar = figure.add_axes((left, 0.42 / height, 3.4 / WIDTH, 0.11 / height))
    figure.colorbar(colours, cax=bar, orientation="horizontal").outline.set_visible(False)
    bar.tick_params(labelsize=8, length=2, colors=SOFT)
    bar.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if heatmap.log else "{x:,.3g}"))
    key = f"{heatmap.scale} Frame: the output's guess. ✓: the guess is right." if written else heatmap.scale
    figure.text(left + 3.6 / WIDTH, 0.42 / height, textwrap.fill(key, 66), fontsize=8, color=SOFT, va="center")
    return figure


def _map(heatmap: Heatmap) -> Colormap:
    return LinearSegmentedColormap.from_list(heatmap.key, COLOURS[heatmap.view.colours]["light"])


def _head(figure: Figure, shown: LensTable, heatmap: Heatmap) -> None:
    """Writes the view's name and the summary: model, step, method."""
    height = figure.get_figheight()
    at = 0.15 / WIDTH
    figure.text(at, 1 - 0.2 / height, heatmap.title, fontsize=12, fontweight="bold", color=INK, va="center")
    figure.text(at, 1 - 0.45 / height, shown.title, fontsize=8.5, color=SOFT, va="center", parse_math=False)


def _label(axes: Axes, shown: LensTable, columns: range, written: bool) -> None:
    """Writes the layers at the left, the tokens below, the next ones above; only positions if the text is long."""
    step = max(1, -(-len(shown.layers) // 24))
    axes.set_yticks(range(0, len(shown.layers), step), shown.layers[::step], fontsize=8.5, color=INK)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if not written:
        ticks = np.linspace(0, len(columns) - 1, 9).astype(int)
        axes.set_xticks(ticks, [f"{shown.positions[columns[x]]:,}" for x in ticks], fontsize=8.5, color=INK)
        axes.set_xlabel("position", fontsize=8.5, color=SOFT)
        return
    axes.set_xticks(np.arange(-0.5, len(columns)), [], minor=True)
    axes.set_yticks(np.arange(-0.5, len(shown.layers)), [], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks([])
    below, above = -0.5 - 0.36 * LINE / CELL * 1.6, len(shown.layers) - 0.5 + 0.36 * LINE / CELL * 1.6
    for x, n in enumerate(columns):
        right = bool(shown.right[n])
        text, colour, weight = (f"✓{shown.nexts[n]}", "#1d7a46", "bold") if right else (shown.nexts[n], SOFT, "normal")
        axes.text(x, above, _short(text), color=colour, weight=weight, **TOKEN)
        axes.text(x, below, _short(shown.tokens[n]), color=INK, **TOKEN)
    for y, name in ((above, "next token"), (below, "token")):
        axes.text(-0.62, y, name, ha="right", va="center", fontsize=7.5, color=SOFT)


def _write_guesses(axes: Axes, shown: LensTable, columns: range, colours: np.ndarray) -> None:
    """Writes the guess into each cell; draws a frame if it is the output's."""
    for r, row in enumerate(shown.guesses):
        for x, n in enumerate(columns):
            ink = "black" if _luminance(colours[r, x, :3]) > 0.179 else "white"
            axes.text(x, r, _short(row[n][0]), color=ink, **TOKEN)
            if shown.agrees[r, n]:
                frame = Rectangle((x - 0.455, r - 0.4), 0.91, 0.8, fill=False, edgecolor=ink, linewidth=0.7)
                axes.add_patch(frame)


def _luminance(rgb: np.ndarray) -> float:
    """Relative luminance of WCAG 2. Above 0.179 black has the better contrast, else white: at least 4.58 : 1."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"

"""The pictures: a PNG of each view, and one HTML page of all of them that needs nothing from outside."""

import json
import math
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data_prep.durable import durable

from .views import Heatmap, LensTable

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "/*SHEET*/null"
CODES = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})
CELL, HEIGHT, LETTERS = 0.82, 0.27, 11  # inches; letters of a guess that fit a cell
BAND = 24  # the most columns side by side; more go below
MOST_COLUMNS = 256  # eleven bands


def write_pictures(sheet: LensTable, folder: Path) -> list[Path]:
    """One PNG a view in `folder`, named by its key; the page; in this order, each whole or not at all.

    Raises OSError if they cannot be written: all of one look are drawn before the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for view in sheet.views:
        picture = BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in the picture; the page has the text
            draw(sheet, view).savefig(picture, dpi=110)
        files[folder / f"{view.key}.png"] = picture.getvalue()
    files[folder / "lens.html"] = page(sheet).encode()
    for path, content in files.items():
        with durable(path) as file:
            file.write(content)
    return list(files)


def draw(sheet: LensTable, view: Heatmap) -> Figure:
    """The input below, the model's output on top. The views of the guesses have them written into their cells."""
    R, N = view.values.shape
    bands = -(-N // BAND)
    width = -(-N // bands)
    figure = Figure(figsize=(max(6.0, 2.4 + CELL * width), 0.4 + (1.7 + HEIGHT * R) * bands), layout="constrained")
    FigureCanvasAgg(figure)
    norm = LogNorm(view.low, view.high) if view.log else Normalize(view.low, view.high)
    colours = ScalarMappable(norm, _colours(view))
    all_axes = figure.subplots(bands, 1, squeeze=False)[:, 0]
    for axes, start in zip(all_axes, range(0, N, width), strict=False):
        columns = range(start, min(start + width, N))
        values = np.clip(view.values[:, columns.start : columns.stop], view.low, view.high)
        axes.imshow(values, norm=norm, cmap=colours.cmap, aspect="auto", origin="lower", interpolation="nearest")
        axes.set_xlim(-0.5, width - 0.5)
        _label(axes, sheet, columns)
        if view.key in ("probability", "logit"):
            _write_guesses(axes, sheet, columns, colours.to_rgba(values))
    figure.colorbar(colours, ax=all_axes, fraction=0.02, pad=0.01, aspect=30 * bands).ax.tick_params(labelsize=7)
    figure.suptitle(f"{view.title}   {sheet.title}", fontsize=9, parse_math=False)
    return figure


def _colours(view: Heatmap) -> str:
    return "viridis" if view.key in ("probability", "logit") else "viridis_r" if view.log else "magma_r"


def _label(axes: Axes, sheet: LensTable, columns: range) -> None:
    """Input tokens below at 45°; true next tokens above, with (*) where the final guess is right."""
    places = range(len(columns))
    axes.set_yticks(range(len(sheet.rows)), sheet.rows, fontsize=7)
    tokens = [sheet.tokens[n] for n in columns]
    axes.set_xticks(places, tokens, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
    above = axes.secondary_xaxis("top")
    nexts = [_short(sheet.nexts[n]) + (" (*)" if sheet.right[n] else "") for n in columns]
    above.set_xticks(places, nexts, rotation=45, ha="left", rotation_mode="anchor", fontsize=7)
    for label in (*axes.get_xticklabels(), *above.get_xticklabels()):
        label.set_parse_math(False)


def _write_guesses(axes: Axes, sheet: LensTable, columns: range, colours: np.ndarray) -> None:
    """The guess in each cell, in black on light colours; a frame where it is the final one."""
    for r, row in enumerate(sheet.guesses):
        for x, n in enumerate(columns):
            light = float(colours[r, x, :3] @ (0.299, 0.587, 0.114)) > 0.55
            ink = "black" if light else "white"
            axes.text(x, r, _short(row[n][0]), ha="center", va="center", fontsize=6.5, color=ink, parse_math=False)
            if sheet.agrees[r, n]:
                axes.add_patch(Rectangle((x - 0.47, r - 0.44), 0.94, 0.88, fill=False, edgecolor="red", linewidth=1.1))


def _short(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def page(sheet: LensTable) -> str:
    """The whole page."""
    data: dict[str, Any] = {
        "title": sheet.title,
        "rows": sheet.rows,
        "positions": sheet.positions,
        "tokens": sheet.tokens,
        "nexts": sheet.nexts,
        "right": sheet.right.tolist(),
        "guesses": sheet.guesses,
        "logits": _rounded(sheet.logits),
        "probabilities": _rounded(sheet.probabilities),
        "agrees": sheet.agrees.tolist(),
        "losses": _rounded(sheet.losses),
        "views": [
            {
                "key": view.key,
                "title": view.title,
                "values": _rounded(view.values),
                "low": view.low,
                "high": view.high,
                "log": view.log,
            }
            for view in sheet.views
        ],
    }
    # No text in the data can end the script that holds them.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(CODES)
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def _rounded(values: np.ndarray) -> Any:
    """Nested lists of numbers of five digits; null where there is none."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(item) for item in value]
        return (value if isinstance(value, int) else float(f"{value:.5g}")) if math.isfinite(value) else None

    return number(values.tolist())

"""Pages that Rowshard writes: one HTML file each, with style, script and data inside, and nothing from a network.

`page.css` and `page.js` are the look and the charts that all pages share; `shell.html` is what surrounds them.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
CODES = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})
THEME = '<div class="tools"><button id="theme">Dark</button></div>'


def page(title: str, body: str, data: dict[str, Any], script: str, style: str = "") -> str:
    """The whole page. `data` is `sheet` in the script; it must hold no NaN or infinity."""
    # No text in the data can end the script that holds them.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(CODES)
    return Template(read("shell.html")).substitute(
        title=escape(title), style=read("page.css") + style, body=body, data=text, script=read("page.js") + script
    )


def read(name: str, folder: Path = HERE) -> str:
    """A file of the package."""
    return (folder / name).read_text(encoding="utf-8")


def header(title: str) -> str:
    """The page's first heading, with the switch between light and dark."""
    return f'<header class="top"><h1>{escape(title)}</h1>{THEME}</header>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A summary: pairs of a name and a text."""
    return '<dl class="facts">' + "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs
    ) + "</dl>"  # fmt: skip


def table(rows: Sequence[Sequence[str]], caption: str = "", long: int | None = None) -> str:
    """An HTML table; the first row and the first column are headings. `long`: a column of text, which may wrap."""

    def cell(tag: str, k: int, text: str) -> str:
        kind = ' class="left long"' if k == long else ""
        return f"<{tag}{kind}>{escape(text)}</{tag.partition(' ')[0]}>"

    head = "".join(cell('th scope="col"', k, text) for k, text in enumerate(rows[0]))
    body = "\n".join(
        "<tr>" + "".join(cell('th scope="row"' if k == 0 else "td", k, text) for k, text in enumerate(row)) + "</tr>"
        for row in rows[1:]
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    parts = f"{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>"
    return f'<div class="wide-table"><table class="facts">{parts}</table></div>'


def section(title: str, *parts: str) -> str:
    """A card with a heading. Leaves out empty parts."""
    return f'<section class="card"><h2>{escape(title)}</h2>' + "\n".join(filter(None, parts)) + "</section>"


def beside(*parts: str) -> str:
    """The parts side by side if there is room, or below each other."""
    return '<div class="beside">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def charts(key: str) -> str:
    """A place for the charts of `charts[key]` in the data of the page."""
    return f'<div data-charts="{escape(key)}"></div>'


def note(text: str, kind: str = "soft") -> str:
    """A paragraph; an empty text gives nothing."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def rounded(values: Any) -> Any:
    """Nested lists of numbers with five digits; null for NaN and infinity."""
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return (values if isinstance(values, int) else float(f"{values:.5g}")) if math.isfinite(values) else None

"""The statistics as one HTML page: summary, charts and tables. Separate from stats.py, which counts."""

from pathlib import Path
from typing import Any

import numpy as np

from data_prep import page as html
from data_prep.stats import Counts, fact_rows, length_rows, most_used_rows, never_used_rows, usage_lines, whole
from data_prep.tokenizer import Tokenizer

POINTS = 200  # of the curve of uses: as many as the eye can tell apart
COLOURS = {"train": "blue", "val": "orange"}
SCRIPT = "charts();\nthemed();\n"


def statistics_page(folder: Path, by_split: dict[str, Counts], tokenizer: Tokenizer) -> str:
    """The whole page."""
    total = whole(by_split)
    summary = [
        ("folder", str(folder)),
        ("tokenizer", f"{tokenizer.spec.name} {tokenizer.fingerprint[:12]}"),
        ("vocabulary", f"{len(total.uses_V):,} rows"),
        ("documents", f"{total.documents:,}"),
        ("tokens", f"{total.tokens:,}"),
        ("bytes per token", f"{total.text_bytes / total.tokens:.3f}"),
    ]
    lengths = [["tokens per document", "documents", "share", "share of tokens"], *length_rows(total)]
    most = [["row", "uses", "share", "text"], *most_used_rows(total, tokenizer)]
    never = [["row", "text"], *never_used_rows(total, tokenizer)]
    parts = [
        html.header(f"Statistics of {folder.name}"),
        "<main>",
        html.facts(summary),
        html.section("Splits", html.table(fact_rows(by_split))),
        html.section("Documents", html.beside(html.charts("lengths"), html.table(lengths))),
        html.section(
            "Rows",
            *map(html.note, usage_lines(total)),
            html.beside(html.charts("uses"), html.table(most, "The most frequent rows", long=3)),
            html.table(never, "The first of the rows never used", long=1) if len(never) > 1 else "",
        ),
    ]
    data = {"charts": {"lengths": [_lengths(total)], "uses": [_uses(by_split)]}}
    return html.page(f"Statistics of {folder.name}", "\n".join([*parts, "</main>"]), data, SCRIPT)


def _lengths(total: Counts) -> dict[str, Any]:
    filled = np.flatnonzero(total.documents_in)
    bins = range(int(filled[0]), int(filled[-1]) + 1)
    lines = [
        {"name": name, "colour": colour, "dashed": False, "points": [[k, values[k] / values.sum()] for k in bins]}
        for name, colour, values in (
            ("documents", "blue", total.documents_in),
            ("their tokens", "orange", total.tokens_in),
        )
    ]
    return {
        "title": "Length of the documents",
        "note": "share of all documents, and of all tokens, per length",
        "x": {"label": "tokens per document, at least", "log": False, "ticks": [[k, f"{2**k:,}"] for k in bins]},
        "y": {"log": False, "percent": True},
        "bars": True,
        "lines": lines,
    }


def _uses(by_split: dict[str, Counts]) -> dict[str, Any]:
    lines = []
    for split, counts in by_split.items():
        uses = np.sort(counts.uses_V)[::-1]
        ranks = np.unique(np.geomspace(1, int((uses > 0).sum()), POINTS).astype(np.int64))
        points = [[int(rank), int(uses[rank - 1])] for rank in ranks]
        lines.append({"name": split, "colour": COLOURS.get(split, "green"), "dashed": False, "points": points})
    return {
        "title": "Use of the rows",
        "note": "how often each row is used, the most frequent first",
        "x": {"label": "rank of the row by frequency", "log": True},
        "y": {"log": True},
        "bars": False,
        "lines": lines,
    }

"""The page of a lens: all views in one HTML file, which needs no network."""

from pathlib import Path
from typing import Any

from data_prep.page import page as whole_page
from data_prep.page import read, rounded

from .views import COLOURS, LensTable

HERE = Path(__file__).parent


def page(shown: LensTable) -> str:
    """The whole page. Guesses are numbers of `texts`: most texts come many times."""
    texts: dict[str, int] = {}
    guesses = [[[texts.setdefault(text, len(texts)) for text in cell] for cell in row] for row in shown.guesses]
    data: dict[str, Any] = {
        "title": shown.title,
        "facts": shown.facts,
        "layers": shown.layers,
        "positions": shown.positions,
        "tokens": shown.tokens,
        "nexts": shown.nexts,
        "right": shown.right.tolist(),
        "texts": list(texts),
        "guesses": guesses,
        "logits": rounded(shown.logits.tolist()),
        "probabilities": rounded(shown.probabilities.tolist()),
        "agrees": shown.agrees.tolist(),
        "losses": rounded(shown.losses.tolist()),
        "colours": COLOURS,
        "views": [
            {
                "key": heatmap.view.key,
                "title": heatmap.view.title,
                "about": heatmap.view.about,
                "unit": heatmap.view.unit,
                "colours": heatmap.view.colours,
                "values": rounded(heatmap.values.tolist()),
                "low": heatmap.low,
                "high": heatmap.high,
                "scale": heatmap.scale,
                "log": heatmap.log,
            }
            for heatmap in shown.views
        ],
    }
    body, script, style = (read(f"page.{kind}", HERE) for kind in ("html", "js", "css"))
    return whole_page(f"Logit lens: {shown.title}", body, data, script, style)

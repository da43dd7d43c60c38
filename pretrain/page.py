"""A page that needs nothing from outside: a template and its data."""

import json
from pathlib import Path
from typing import Any

CODES = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def filled(template: Path, place: str, data: Any) -> str:
    """The template with the data as JSON in that place of a script: no text in them can end it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    before, after = template.read_text(encoding="utf-8").split(place)
    return before + text.translate(CODES) + after

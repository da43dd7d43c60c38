"""Pictures of docs/pictures.py: legible at 850 pixels, and drawn again after a change."""

import importlib.util
import re
from itertools import combinations
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from .pages import DOCS


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = load()


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_texts_are_legible_inside_and_apart(name: str) -> None:
    figure = pictures.PICTURES[name]().figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = figure.axes[0].texts
    assert len(texts) > 20
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert text.get_fontsize() >= 12, text.get_text()
        assert box.x0 >= 4 and box.x1 <= pictures.WIDTH - 4 and box.y0 >= 0 and box.y1 <= figure.bbox.height, text
    for (one, first), (other, second) in combinations(zip(texts, boxes, strict=True), 2):
        assert not first.shrunk(0.95, 0.8).overlaps(second.shrunk(0.95, 0.8)), (one.get_text(), other.get_text())


def test_committed_pictures_are_current(tmp_path: Path) -> None:
    for path in pictures.draw(tmp_path):
        committed = (DOCS / path.name).read_text(encoding="utf-8")
        version = re.search(r"Matplotlib v([\d.]+)", committed)
        assert version, path.name
        drawn = path.read_text(encoding="utf-8")
        if version[1] != matplotlib.__version__:  # which may place a line elsewhere; the texts are the same
            drawn, committed = ("\n".join(re.findall(r"<!-- .* -->", svg)) for svg in (drawn, committed))
        assert drawn == committed, f"{path.name} is out of date: python docs/pictures.py"

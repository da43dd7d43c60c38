"""The pictures and the page, looked at in a real browser."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pretrain.lens.lens import LensResult, run_lens
from pretrain.lens.method import Method
from pretrain.lens.plot import draw, page, write_pictures
from pretrain.lens.views import Heatmap, LensTable, sheet, visible
from tests.browser import dumped, screenshot
from tests.pretrain.lens.test_lens import VOCAB, owner, problem

NASTY = "</script><b>&amp;$x_2$"  # what a token may be: a tag, an entity, a formula
KEYS = ["probability", "logit", "rank_final", "kl_final", "kl_input"]
KEYS += ["rank_input", "kl_final_reverse", "kl_input_reverse", "entropy"]


def named(id: int) -> str:
    return NASTY if id == 7 else f"t{id}"


@pytest.fixture(scope="module")
def seen() -> tuple[LensResult, LensTable]:
    body, weight, tokens, targets = problem("gpt2")
    tokens = tokens[:1].clone()
    tokens[0, 3] = 7
    found = run_lens(owner(0, 1, weight), body, body, tokens, targets[:1], Method(), k=3)
    columns = [n for n in range(tokens.shape[1]) if n != 5]
    return found, sheet(found, f"a model {NASTY}", columns, 0, named, VOCAB)


def views_of(shown: LensTable) -> dict[str, Heatmap]:
    return {view.key: view for view in shown.views}


class Cells(HTMLParser):
    """The table of a page: of each cell its row, column, classes, style and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: dict[tuple[int, int], SimpleNamespace] = {}
        self._open = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "td" and "data-row" in attrs:
            key = int(attrs["data-row"]), int(attrs["data-column"])
            classes = (attrs.get("class") or "").split()
            self._open = self.cells[key] = SimpleNamespace(text="", classes=classes, style=attrs.get("style", ""))

    def handle_endtag(self, tag):
        if tag == "td":
            self._open = None

    def handle_data(self, data):
        if self._open is not None:
            self._open.text += data


def tip_of(dom: str) -> str:
    """The text of the box beside a cell, or "" where it is hidden."""
    opened = dom[dom.index('<div id="tip"') : dom.index('<p id="note"')]
    return re.sub(r"<[^>]+>", "\n", opened) if "display: block" in opened.split(">")[0] else ""


def test_the_page_shows_every_cell(browser, seen, tmp_path):
    _, shown = seen
    (tmp_path / "lens.html").write_text(page(shown))
    dom = dumped(browser, (tmp_path / "lens.html").as_uri(), tmp_path).stdout
    table = Cells(dom).cells
    assert len(table) == len(shown.rows) * len(shown.tokens)
    for (r, n), cell in table.items():
        assert cell.text == shown.guesses[r][n][0]
        assert ("agrees" in cell.classes) == bool(shown.agrees[r, n])
    assert all("agrees" in table[len(shown.rows) - 1, n].classes for n in range(len(shown.tokens)))
    colours = {cell.style for cell in table.values()}
    assert len(colours) > 10, "every cell has the colour of its value"
    assert dom.count("(*)</span>") == int(shown.right.sum())
    assert tip_of(dom) == ""


@pytest.mark.parametrize("key", KEYS)
def test_a_cell_of_a_view_can_be_linked_to(browser, seen, tmp_path, key):
    """The box has the numbers of the cell, the heading is the view's."""
    _, shown = seen
    (tmp_path / "lens.html").write_text(page(shown))
    r, n = 1, 3
    dom = dumped(browser, (tmp_path / "lens.html").as_uri() + f"#view={key}&row={r}&column={n}", tmp_path).stdout
    tip = tip_of(dom)
    view = views_of(shown)[key]
    assert f"{view.title} · logit lens" in re.search("<title>(.*?)</title>", dom)[1].replace("&amp;", "&")
    assert re.search(rf'data-view="{key}" aria-pressed="true"', dom) and dom.count('aria-pressed="true"') == 1
    assert f"{shown.rows[r]}, position {shown.positions[n]}" in tip and shown.guesses[r][n][2] in tip
    for one in shown.views[2:]:
        number = re.search(re.escape(one.title) + r": (\S+)", tip)
        assert number and math.isclose(float(number[1]), float(one.values[r, n]), rel_tol=6e-3, abs_tol=1e-9), tip


def test_pointing_at_a_cell_opens_its_box(browser, seen, tmp_path):
    _, shown = seen
    point = """<script>document.querySelector('#grid td[data-row="2"][data-column="4"]')
      .dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));</script></body>"""
    (tmp_path / "lens.html").write_text(page(shown).replace("</body>", point))
    dom = dumped(browser, (tmp_path / "lens.html").as_uri(), tmp_path).stdout
    assert f"{shown.rows[2]}, position {shown.positions[4]}" in tip_of(dom)


def test_the_page_needs_nothing_from_outside(seen):
    text = page(seen[1])
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest|https?:", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == 1, "a token must not end the script"
    data = json.loads(re.search(r"const sheet = (.*);\n", text)[1])
    assert data["tokens"][3] == NASTY and data["nexts"] == seen[1].nexts


def test_a_page_of_a_diverged_model_opens(browser, tmp_path):
    body, weight, tokens, targets = problem("gpt2")
    found = run_lens(owner(0, 1, weight * math.nan), body, body, tokens[:1], targets[:1], Method(), k=2)
    write_pictures(sheet(found, "nan", list(range(4)), 0, named, VOCAB), tmp_path)
    dom = dumped(browser, (tmp_path / "lens.html").as_uri() + "#view=entropy&row=0&column=0", tmp_path).stdout
    assert "Entropy, nats: –" in tip_of(dom)


def test_a_look_that_fails_leaves_the_one_before_it_whole(seen, tmp_path, monkeypatch):
    paths = write_pictures(seen[1], tmp_path)
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr("pretrain.lens.plot.page", lambda shown: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_pictures(replace(seen[1], title="another"), tmp_path)
    assert [path.read_bytes() for path in paths] == before and sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_pictures_are_seen(browser, seen, tmp_path):
    """Each PNG is one that the browser can show, and the page's screenshot has its colours."""
    _, shown = seen
    paths = write_pictures(shown, tmp_path / "out")
    assert [path.name for path in paths] == [*(f"{key}.png" for key in KEYS), "lens.html"]
    album = "".join(f'<img src="{path.as_uri()}">' for path in paths[:-1])
    script = """<script>addEventListener("load", () => { document.body.dataset.widths =
      [...document.images].map((image) => image.naturalWidth).join(" "); });</script>"""
    (tmp_path / "album.html").write_text(f"<body>{album}{script}</body>")
    dom = dumped(browser, (tmp_path / "album.html").as_uri(), tmp_path).stdout
    widths = [int(width) for width in re.search('data-widths="([^"]+)"', dom)[1].split()]
    assert len(widths) == len(KEYS) and min(widths) > 600
    for path in paths[:-1]:
        assert len(np.unique(imread(path).reshape(-1, 4), axis=0)) > 20, f"{path.name} is blank"
    seen_by_visitor = imread(screenshot(browser, paths[-1].as_uri(), tmp_path))[..., :3]
    coloured = (seen_by_visitor.max(-1) - seen_by_visitor.min(-1)) > 0.2
    assert coloured.mean() > 0.005, "the cells have colours"


def test_a_long_window_goes_on_below(seen):
    """Bands of even width."""
    found, _ = seen
    wide = sheet(found, "", [n % 11 for n in range(49)], 0, named, VOCAB)
    figure = draw(wide, views_of(wide)["kl_final"])
    assert [len(axes.get_xticks()) for axes in figure.axes[:3]] == [17, 17, 15]


@pytest.mark.parametrize(
    "data,text",
    [
        (b" the", "·the"),
        (b"  ", "··"),
        (b"", ""),
        (b"a b", "a b"),
        (b"\n\n", "↵↵"),
        (b" x\t", "·x⇥"),
        (b"\xe2\x82", "\\xe2\\x82"),
        ("é".encode(), "é"),
        (b"\x00", "\\x00"),
    ],
)
def test_a_token_can_be_read(data, text):
    assert visible(data) == text


def test_every_view_of_a_look(seen):
    """The views take the numbers that they are called by; the columns are the chosen ones."""
    found, shown = seen
    columns = [n for n in range(11) if n != 5]
    reading = found.reading
    truth = {
        "probability": found.probabilities[..., 0],
        "logit": reading.top_logits[..., 0],
        "rank_final": reading.ranks[..., 0],
        "kl_final": reading.kl_from[..., 0],
        "kl_input": reading.kl_from[..., 1],
        "rank_input": reading.ranks[..., 1],
        "kl_final_reverse": reading.kl_to[..., 0],
        "kl_input_reverse": reading.kl_to[..., 1],
        "entropy": reading.entropy,
    }
    views = views_of(shown)
    assert list(views) == list(truth) and shown.positions == columns
    for key, values in truth.items():
        assert torch.equal(torch.from_numpy(views[key].values), values[:, columns])
    assert [(views[key].high, views[key].log) for key in ("rank_final", "rank_input", "kl_final")] == [
        (100, True),
        (1000, True),
        (30.0, False),
    ]

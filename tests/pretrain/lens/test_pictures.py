"""The lens's pictures and page, in a real browser."""

import json
import math
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pretrain.lens.lens import LensResult, run_lens
from pretrain.lens.method import Method
from pretrain.lens.page import page
from pretrain.lens.plot import draw, write_pictures
from pretrain.lens.views import Heatmap, LensTable, lens_table, visible
from tests.browser import CONTRAST, DARK, NARROW, SIDEWAYS, dumped, evaluated, screenshot
from tests.pretrain.lens.test_lens import owner, problem

NASTY = "</script><b>&amp;$x_2$"  # a token may look like a tag, an entity or a formula
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
    facts = [("prompt", NASTY), ("model", "tiny, 1.0M parameters"), ("step", "450")]
    return found, lens_table(found, f"a model {NASTY}", facts, columns, 0, named)


def views_of(shown: LensTable) -> dict[str, Heatmap]:
    return {view.key: view for view in shown.views}


class Cells(HTMLParser):
    """The cells of a page's grid: row, column, classes, style and text."""

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


def numbers_of(text: str, shown: LensTable, r: int, n: int) -> None:
    """Asserts that a text of the page has all numbers of the cell."""
    for view in shown.views:
        number = re.search(re.escape(view.title) + r"\s*([\d.,e-]+)", text)
        assert number, (view.title, text)
        assert math.isclose(float(number[1].replace(",", "")), float(view.values[r, n]), rel_tol=6e-3, abs_tol=1e-9)


def test_page_shows_every_cell(browser, seen, tmp_path):
    _, shown = seen
    (tmp_path / "lens.html").write_text(page(shown))
    dom = dumped(browser, (tmp_path / "lens.html").as_uri(), tmp_path).stdout
    table = Cells(dom).cells
    assert len(table) == len(shown.layers) * len(shown.tokens)
    for (r, n), cell in table.items():
        assert cell.text == shown.guesses[r][n][0]
        assert ("agrees" in cell.classes) == bool(shown.agrees[r, n])
    assert all("agrees" in table[len(shown.layers) - 1, n].classes for n in range(len(shown.tokens)))
    assert len({cell.style for cell in table.values()}) > 10, "every cell has the colour of its value"
    assert dom.count('class="token right"') == int(shown.right.sum())
    for name, text in shown.facts:
        assert f"<dt>{name}</dt>" in dom and escape(text, quote=False) in dom


def test_address_selects_view_and_cell(browser, seen, tmp_path):
    _, shown = seen
    code = """return sheet.views.map((one) => {
      location.hash = `view=${one.key}&row=1&column=3`;
      open();
      const pressed = [...document.querySelectorAll("[aria-pressed=true][data-view]")].map((one) => one.dataset.view);
      return [one.key, document.title, pressed, byId("inspector").innerText, byId("cap").textContent];
    });"""
    results = evaluated(browser, page(shown), code, tmp_path)
    assert [key for key, *_ in results] == KEYS
    for (key, title, pressed, text, cap), view in zip(results, shown.views, strict=True):
        assert title == f"{view.view.title} · Logit lens" and pressed == [key] and cap == view.scale
        assert f"{shown.layers[1]} · position {shown.positions[3]} · pinned" in text and shown.guesses[1][3][2] in text
        numbers_of(text, shown, 1, 3)


@pytest.fixture(scope="module")
def long(seen) -> LensTable:
    return lens_table(seen[0], "long", [], [n % 11 for n in range(1000)], 0, named)


def test_thousand_tokens_never_scroll_sideways(browser, long, tmp_path):
    """Keys, search, strip and pointer move a window of the positions; the page stays as wide as the screen."""
    token = long.tokens[2]
    code = f"""const seen = {{ before: {SIDEWAYS}, count, strip: !byId("strip").hidden }};
    const press = (key, target = document.body) =>
      target.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }}));
    const cell = () => [state.row, state.column, state.first <= state.column && state.column < state.first + count,
                        document.querySelectorAll("#grid td.on").length];
    for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) press(key);
    seen.moved = cell();
    press("Enter");
    seen.hash = location.hash;
    press("End");
    seen.end = cell();
    press("PageUp");
    seen.back = state.first;
    press("Home");
    press("/");
    seen.focus = document.activeElement.id;
    byId("search").value = "{token}";
    byId("search").dispatchEvent(new Event("input"));
    press("Enter", byId("search"));
    seen.found = [sheet.tokens[state.column], hits.length, byId("found").textContent];
    byId("search").blur();
    press("?");
    seen.help = byId("help").open;
    byId("help").close();
    const bar = byId("strip").getBoundingClientRect();
    const at = (type, x) =>
      byId("strip").dispatchEvent(new PointerEvent(type, {{ clientX: bar.left + x * bar.width, bubbles: true }}));
    byId("strip").setPointerCapture = () => {{}};
    at("pointerdown", 0.5);
    seen.clicked = state.first + count / 2;
    at("pointermove", 0.75);
    seen.dragged = state.first + count / 2;
    at("pointerup", 0.75);
    byId(`cell-2-${{state.first}}`).dispatchEvent(new PointerEvent("pointerover", {{ bubbles: true }}));
    const place = `position ${{sheet.positions[state.first]}}`;
    seen.tip = [getComputedStyle(byId("tip")).display, byId("tip").innerText.includes(place)];
    seen.table = [matrix().length, matrix()[0].length, everything().length];
    seen.after = {SIDEWAYS};
    return seen;"""
    found = evaluated(browser, page(long), code, tmp_path, "--window-size=1400,900")
    top = len(long.layers) - 1
    assert found["before"] == found["after"] == 0 and found["strip"] and 5 < found["count"] < 30
    assert found["moved"] == [top - 1, 1, True, 1], "the first key selects the first cell"
    assert found["hash"] == f"#view=probability&row={top - 1}&column=1"
    assert found["end"] == [top - 1, 999, True, 1] and found["back"] == 1000 - 2 * found["count"]
    hits = [n for n, text in enumerate(long.tokens) if token in text]
    assert found["focus"] == "search" and found["found"] == [long.tokens[hits[1]], len(hits), f"2 of {len(hits)}"]
    assert found["help"] is True and found["tip"] == ["block", True]
    assert abs(found["clicked"] - 500) <= 2 and abs(found["dragged"] - 750) <= 2
    assert found["table"] == [3 + len(long.layers), 1001, 1 + 1000 * len(long.layers)]


@pytest.mark.parametrize("flags", [(), (DARK, NARROW)], ids=["light", "dark and narrow"])
def test_printed_text_is_legible(browser, long, tmp_path, flags):
    """Contrast is at least 4.5 on the colours of all cells and views; the theme is the system's, then the other."""
    code = f"""const contrast = {CONTRAST};
    const cells = () => sheet.views.map((one) => {{ setView(one.key); return contrast("#grid td"); }});
    choose(1, 3);
    const texts = "p, dt, dd, h1, h2, h3, th, button, summary, .context, #ticks span, #range";
    const seen = [dark(), Math.min(...cells()), contrast(texts)];
    byId("theme").click();
    return [[...seen], [dark(), Math.min(...cells()), contrast(texts)], {SIDEWAYS}];"""
    first, second, beyond = evaluated(browser, page(long), code, tmp_path, *flags)
    assert [first[0], second[0]] == ([True, False] if flags else [False, True])
    assert min(*first[1:], *second[1:]) >= 4.5 and beyond == 0


def test_page_needs_no_network(seen):
    text = page(seen[1])
    loads = r"(src|href)\s*=\s*[\"']|@import|url\(|fetch\(|XMLHttpRequest|https?:(?!//www\.w3\.org/2000/svg)"
    assert not re.search(loads, text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == 1, "a token must not end the script"
    data = json.loads(re.search(r"const sheet = (.*);\n", text)[1])
    assert data["tokens"][3] == NASTY and data["nexts"] == seen[1].nexts


def test_page_of_diverged_model_opens(browser, tmp_path):
    body, weight, tokens, targets = problem("gpt2")
    found = run_lens(owner(0, 1, weight * math.nan), body, body, tokens[:1], targets[:1], Method(), k=2)
    write_pictures(lens_table(found, "nan", [], list(range(4)), 0, named), tmp_path)
    dom = dumped(browser, (tmp_path / "lens.html").as_uri() + "#view=entropy&row=0&column=0", tmp_path).stdout
    assert "<dt>Entropy, nats</dt><dd>–</dd>" in dom and "No value is finite." in dom


def test_failed_write_keeps_the_files_before_it(seen, tmp_path, monkeypatch):
    shown = replace(seen[1], views=seen[1].views[:2])
    paths = write_pictures(shown, tmp_path)
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr("pretrain.lens.plot.page", lambda table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_pictures(replace(shown, title="another"), tmp_path)
    assert [path.read_bytes() for path in paths] == before and sorted(tmp_path.iterdir()) == sorted(paths)


def test_pictures_are_visible(browser, seen, tmp_path):
    """The browser can show each PNG, and the screenshot of the page has its colours."""
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
        assert len(np.unique(imread(path)[::5, ::5].reshape(-1, 4), axis=0)) > 20, f"{path.name} is blank"
    seen_by_visitor = imread(screenshot(browser, paths[-1].as_uri(), tmp_path))[..., :3]
    coloured = (seen_by_visitor.max(-1) - seen_by_visitor.min(-1)) > 0.2
    assert coloured.mean() > 0.005, "the cells have colours"


def test_long_text_goes_on_in_bands(seen, long):
    """Bands of even width, with texts; a text that is much longer is one band of colours."""
    wide = lens_table(seen[0], "", [], [n % 11 for n in range(25)], 0, named)
    figure = draw(wide, views_of(wide)["kl_final"])
    assert [axes.get_xlim()[1] - axes.get_xlim()[0] for axes in figure.axes[:3]] == [9, 9, 7]
    figure = draw(long, views_of(long)["kl_final"])
    assert figure.axes[0].get_xlim() == (-0.5, 999.5) and len(figure.axes) == 2, "and the bar of the colours"


def test_colours_fit_the_layers_above_the_input(long):
    """The scale names its end: what is beyond it has the last colour."""
    for view in long.views:
        above = view.values[1:]
        end = max(10, math.ceil(np.percentile(above, 99))) if view.log else np.percentile(above, 99)
        assert view.high == pytest.approx(end) and view.low <= view.high
        assert re.search(r"end at (the 99th percentile above the input: )?[\d.,]+\. The largest", view.scale), (
            view.scale
        )
        assert (above <= view.high).mean() >= 0.98


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
def test_token_text_is_visible(data, text):
    assert visible(data) == text


def test_views_show_the_numbers_of_their_names(seen):
    """Each view has the numbers of its measure, at the chosen columns."""
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
    assert [key for key in views if views[key].log] == ["rank_final", "rank_input"]

"""`make docs`: the pages are whole, and a fault in one fails the build."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import vocab
from tests.docs.pages import DOCS, ROOT, anchors, blocks, links, pages


def build(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", *options, source, out]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    done = build(DOCS, folder, "-b", "html")
    assert done.returncode == 0, done.stderr
    return folder


def test_has_every_page(site: Path) -> None:
    built = {page.stem for page in site.glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} <= built
    index = (site / "index.html").read_text()
    assert all(f'href="{page.stem}.html"' in index for page in DOCS.glob("*.md") if page.stem != "index")


LOADED = re.compile(r'<(?:script|img|iframe)\b[^>]*\bsrc="([^"]+)"|<link\b[^>]*\bhref="([^"]+)"')


def test_needs_no_network(site: Path) -> None:
    for page in site.glob("*.html"):
        names = [src or href for src, href in LOADED.findall(page.read_text())]
        assert names and not [name for name in names if "//" in name], page.name
    formulas = (site / "how-it-works.html").read_text()
    assert formulas.count("<math ") > 100 and "\\frac" not in formulas


def test_api_has_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text()
    assert all(f'id="pretrain.vocab.{name}"' in page for name in vocab.__all__)
    assert 'id="pretrain.vocab.VocabParallelEmbedding.loss"' in page and "&gt;&gt;&gt; " in page


def test_each_kind_of_fault_fails(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((DOCS / "conf.py").read_text())
    (source / "index.md").write_text("# Index\n\n## Pages\n\n- [a](a.md)\n")
    (source / "a.md").write_text("# A\n\n[](gone.md) [](index.md#gone) ![](gone.png)\n")
    (source / "alone.md").write_text("# Alone\n")
    done = build(source, tmp_path / "out", "-b", "dummy")
    assert done.returncode == 1
    for fault in ("gone.md", "gone.png", "'gone'", "alone.md: WARNING: document isn't included in any toctree"):
        assert fault in done.stderr, done.stderr
    assert done.stderr.count("WARNING") == 4, done.stderr


TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", TOP, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_blocks_have_a_language() -> None:
    bare = [f"{block.page}:{block.line}" for page in pages() for block in blocks(page) if not block.language]
    assert not bare

"""`make docs`: the pages are whole, and a fault in one fails the build."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, anchors, blocks, links, pages


def build(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", *options, source, out]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path, "-b", "html")
    assert done.returncode == 0, done.stderr
    built = {page.stem for page in tmp_path.glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} <= built
    index = (tmp_path / "index.html").read_text()
    assert all(f'href="{page.stem}.html"' in index for page in DOCS.glob("*.md") if page.stem != "index")


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

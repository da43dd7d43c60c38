"""Reads the Markdown of the documentation: its code blocks, headings and links."""

import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


class Block(NamedTuple):
    """A fenced code block. line: of its first line of code, from 1 on."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[Path]:
    """README.md and all pages of docs/, by name."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page, in order."""
    name = str(page.relative_to(ROOT))
    return [
        Block(name, token.map[0] + 2, token.info.strip(), token.content)
        for token in _tokens(page)
        if token.type == "fence" and token.map
    ]


def links(page: Path) -> Iterator[str]:
    """The addresses of a page's links and images."""
    for token in _tokens(page):
        for child in token.children or ():
            if child.type in ("link_open", "image"):
                yield str(child.attrs.get("href") or child.attrs.get("src"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    tokens = _tokens(page)
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {_anchor(title) for title in titles}


def _anchor(title: str) -> str:
    kept = (letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")
    return "".join(kept)


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def commands(block: Block) -> list[list[str]]:
    """The commands of a block in the shell, as words. Raises ValueError for a quotation that does not end."""
    found, unread = [], ""
    for line in block.text.splitlines():
        unread = f"{unread}\n{line}" if unread else line
        if line.endswith("\\"):
            unread = unread[:-1]
            continue
        try:
            words = shlex.split(unread, comments=True)
        except ValueError:  # a quotation that goes over several lines
            continue
        found += [words] if words else []
        unread = ""
    if unread:
        raise ValueError(f"{block.page}:{block.line}: {unread} does not end")
    return found

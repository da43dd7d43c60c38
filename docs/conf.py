"""The site that `make docs` builds. Pages are plain Markdown, which GitHub shows as well, so they hold no directives:
the navigation is made from the headings and links of index.md, the signatures of api.md from the code.
"""

import re

from docutils.nodes import SkipNode
from latex2mathml import converter

project = "Rowshard"
copyright = "the Rowshard authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath"]  # as GitHub shows mathematics
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Rowshard"
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"  # every browser draws it, without a script or the network
myst_heading_anchors = 4  # page.md#anchor is checked, with GitHub's names of anchors
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pretrain\.vocab\.\w+$).*")]  # only the public names are on the site
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"

BLOCK = "overflow: auto hidden; padding: 0.5em 0"  # a long formula scrolls alone
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
PAGE = re.compile(r"\]\(([\w-]+)\.md\)")


def navigation(index: str) -> str:
    """A hidden toctree for each heading of the index that has pages below it."""
    _, *parts = HEADING.split(index)
    pages = ((title, PAGE.findall(text)) for title, text in zip(parts[::2], parts[1::2], strict=True))
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(names) + "\n```\n"
        for title, names in pages
        if names
    )


def signatures() -> str:
    """A heading and a directive for each public name of pretrain.vocab."""
    from pretrain import vocab  # imports torch, which no other page needs

    text = ""
    for name in vocab.__all__:
        kind = "class" if isinstance(getattr(vocab, name), type) else "function"
        members = "\n   :members:" if kind == "class" else ""
        text += f"\n## {name}\n\n```{{eval-rst}}\n.. auto{kind}:: pretrain.vocab.{name}{members}\n```\n"
    return text


def _complete(app: object, name: str, source: list[str]) -> None:
    if name == "index":
        source[0] += navigation(source[0])
    if name == "api":
        source[0] += signatures()


def _as_rst(app: object, kind: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with code in single backticks. Escapes what reStructuredText would read as more."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            pieces = line.split("`")
            pieces[::2] = (re.sub(r"([*_|\\])", r"\\\1", piece) for piece in pieces[::2])
            lines[i] = "``".join(pieces)


def _inline(self, node) -> None:  # type: ignore[no-untyped-def]
    """Writes a formula within a line. `self`: Sphinx's writer of HTML."""
    self.body.append(converter.convert(node.astext()))
    raise SkipNode


def _block(self, node) -> None:  # type: ignore[no-untyped-def]
    """Writes a formula on lines of its own."""
    self.body.append(f'<div style="{BLOCK}">{converter.convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app) -> None:  # type: ignore[no-untyped-def]
    app.connect("source-read", _complete)
    app.connect("autodoc-process-docstring", _as_rst)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))

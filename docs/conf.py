"""The site that `make docs` builds. Pages are plain Markdown, which GitHub shows as well, so they hold no directives:
the navigation is made from the headings and links of index.md.
"""

import re

project = "Rowshard"
copyright = "the Rowshard authors, Apache-2.0"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "amsmath"]  # as GitHub shows mathematics
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Rowshard"
html_show_sphinx = False
html_copy_source = False
myst_heading_anchors = 4  # page.md#anchor is checked, with GitHub's names of anchors
nitpicky = True

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


def _add_navigation(app: object, name: str, source: list[str]) -> None:
    if name == "index":
        source[0] += navigation(source[0])


def setup(app) -> None:  # type: ignore[no-untyped-def]
    app.connect("source-read", _add_navigation)

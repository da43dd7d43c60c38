"""docs/troubleshooting.md: each message that it quotes is in the source, and each class of an end has its line."""

import ast
import re
from pathlib import Path

import pytest

from pretrain.exits import Exit

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
VALUE = "…"


def texts() -> list[str]:
    """The texts of the source, an f-string's values as VALUE; those that are joined by + or , stand alone."""
    found = []
    for folder in ("launch", "pretrain", "data_prep"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


TEXTS = texts()


def quoted() -> list[str]:
    """The first cells of the tables headed "message"."""
    found, ours = [], False
    for line in PAGE.splitlines():
        if line.startswith("| "):
            cell = line.split(" | ")[0].removeprefix("| ")
            if cell == "message":
                ours = True
            elif ours and (text := re.fullmatch(r"`([^`]+)`", cell)):
                found.append(text[1].replace("\\|", "|"))
        elif not line.startswith("|"):
            ours = False
    return found


@pytest.mark.parametrize("message", quoted())
def test_quoted_message_is_in_the_source(message):
    """Its words between values, in their order, in one text."""
    pattern = re.compile(".*?".join(map(re.escape, message.split(VALUE))), re.DOTALL)
    assert any(map(pattern.search, TEXTS)), "no command prints that: quote the message of today"


def test_page_quotes_messages_with_words():
    assert len(quoted()) > 90
    assert all(len(re.sub(r"[\W…]", "", message)) > 5 for message in quoted())


def test_every_class_of_an_end_has_its_line():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (−?\d+)", PAGE, re.MULTILINE))
    assert {name: int(code.replace("−", "-")) for name, code in rows.items()} == {end.name: end.value for end in Exit}


def test_a_message_that_nothing_prints_is_found_out():
    assert not any("this text is printed by no command" in text for text in TEXTS)
    with pytest.raises(AssertionError):
        test_quoted_message_is_in_the_source("engine.offload=… must be paid")

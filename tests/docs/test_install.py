"""Every documented command names a missing package in one line that says what to do."""

import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, blocks, commands, pages


def entries() -> list[tuple[str, ...]]:
    """The programs that the documentation starts with `python`, as words."""
    typed = (words for page in pages() for block in blocks(page) if block.language == "sh" for words in commands(block))
    programs = {tuple(words[1 : 2 + (words[1] == "-m")]) for words in typed if words[0] == "python"}
    return sorted(words for words in programs if words[-1].startswith(("launch/", "pretrain", "data_prep")))


@pytest.mark.parametrize("program", entries(), ids=" ".join)
def test_a_missing_package_is_one_line(program: tuple[str, ...]) -> None:
    command = [sys.executable, "-S", *program, "key=value"]  # -S: without site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: the package ") and done.stderr.count("\n") == 1, done.stderr
    assert "is missing: run `make setup`" in done.stderr

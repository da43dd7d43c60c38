"""Finds words in code and documents that a reader must translate first: `python tests/english.py`, part of `make lint`.

It checks what a program can check; a docstring's first word, and phrases with a plainer form. `# english: quoted` on a
line excuses that line: a test may need the words of others. A linter of prose (vale, proselint) is not used: vale is a
program that pip cannot bring along, and neither knows docstrings from other strings.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

FIRST_WORDS = (
    "As At By For From If In Of On Over Since Such Than That This Those To Under Until Upon What Where Whether Which "
    "While Who Whoever Whom Whose With Within Without"
)
EXCUSE = "english: quoted"
EXAMPLES = ("tests/english.py", "tests/test_english.py")  # hold the phrases themselves
PHRASES = {  # what to look for, and what to write
    r"Errors? where\b": "Raises XError if …",
    r"\bwhere it\b(?! (?:is|was)\b)": "if it",
    r"\bof which\b": "two sentences",
    r"\bso many\b": "the number",
    r"\bwhoever\b": "if you …, or a user that …",
    r"\bgone? on with\b": "resume",
    r"\bgo(?:es)? on by itself\b": "resumes by itself",
    r"\bwithout a word\b": "without a message",
    r"\banew\b": "again, or from the start",
    r"\bfor ever\b": "the value's effect: disables it, never ends",
    r"\bis told\b|\bare told\b|\bnot told\b|\btold (?:so|of)\b": "is reported",
    r"\bis no (?:name|option|number|key|file|folder|path|valid|integer|setting|text|list)\b": "is not a …",
    r"\bpoison\b": "malformed documents",
    r"\bthat of\b the same\b": "the same",
    r"\bnought\b|\bwhereof\b|\bthereof\b|\btherein\b|\bwherein\b|\bhence\b|\bthence\b|\blest\b": "a plain word",
    r"\bfit(?:s)? not\b|\bknows? not\b|\bneeds? not\b|\bhas no need\b": "does not fit, know, need",
    r"\bbrings? as many\b": "must pass the same number",
    r"\ba look at (?:the matrix|it)\b|\blooks? of the lens\b": "a measurement",
    r"\bas it (?:is|was) meant\b": "as intended",
    r"\bat hand\b": "available",
    r"\bcome(?:s)? of it\b|\bcame of it\b": "the result",
    r"\bdoes what it always does\b": "its default action",
    r"\bthe one that (?:all|every)\b": "the common",
}
PATTERNS = [(re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), better) for pattern, better in PHRASES.items()]


def main() -> None:
    """Prints a line per finding, and exits 1 if there are any."""
    root = Path(__file__).resolve().parent.parent
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    found = [
        f"{name}:{line}: {words!r}: write {better}"
        for name in listed.stdout.splitlines()
        if (root / name).exists() and name not in EXAMPLES
        for line, words, better in findings(root / name)
    ]
    print("\n".join(found) or "plain words: nothing found")
    sys.exit(f"{len(found)} phrases to write plainly, see CONTRIBUTING.md" if found else 0)


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line, words and what to write, for each finding in a Python, Markdown or YAML file."""
    if path.suffix not in (".py", ".md", ".yaml"):
        return
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if path.suffix == ".py":
        yield from _docstrings(text)
        prose = _comments_and_strings(text)
    else:
        prose = (
            [(1, text)] if path.suffix == ".md" else [(n, line.partition("#")[2]) for n, line in enumerate(lines, 1)]
        )
    for line, words in prose:
        for pattern, better in PATTERNS:
            for match in pattern.finditer(words):
                at = line + words.count("\n", 0, match.start())
                if EXCUSE not in lines[at - 1]:
                    yield at, match[0], better


def _docstrings(text: str) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            doc = ast.get_docstring(node)
            if doc and first and doc.split()[0].rstrip(",:") in FIRST_WORDS.split():
                yield first.lineno, doc.split()[0] + " …", "a verb or a noun first"


def _comments_and_strings(text: str) -> list[tuple[int, str]]:
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


if __name__ == "__main__":
    main()

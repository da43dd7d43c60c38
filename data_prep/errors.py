"""The exception for wrong input or settings, as opposed to bugs of the program; words for paths."""

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path


class DataError(ValueError):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and the rule that it breaks."""


def headline(error: BaseException) -> str:
    """The first line of another library's exception, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def nearest(path: Path, before: str = "") -> str:
    """Says which part of a path does not exist and which name is near, as in "data/mien does not exist; there is
    data/mine", with the text `before` it. Empty if the path exists.
    """
    path = Path(path)
    if path.exists():
        return ""
    while not path.parent.exists():
        path = path.parent
    names: list[str] = []
    with suppress(OSError):
        names = [entry.name for entry in path.parent.iterdir()]
    near = get_close_matches(path.name, names, 1)
    return f"{before}{path} does not exist{f'; there is {path.parent / near[0]}' if near else ''}"


def no_token_files(path: Path) -> str:
    """The rest of a message about a path without a manifest: what is wrong with it, and what to do."""
    if missing := nearest(path):
        return f"must be a folder of token files: {missing}"
    if (path / "unfinished").is_dir():
        return "is unfinished: the same tokenising command does the rest"
    if pair := next(iter(sorted(path.glob("*.bin"))), None):
        return (
            f"has .bin files, but manifest.json is missing: copy it, too; or give the prefix of one pair,"
            f" {pair.with_suffix('')}"
        )
    return (
        f"has no token files; make them: python data_prep/tokenize.py corpus=files corpus.paths={path} out=NEW_FOLDER"
    )

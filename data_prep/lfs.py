"""Detects Git LFS pointers: the small texts that a clone has in place of files before `git lfs pull`.

A separate module, because the readers of all formats use it.
"""

from pathlib import Path

from data_prep.errors import DataError

MARK = b"version https://git-lfs.github.com/spec/"
LONGEST = 1024  # bytes of a pointer, from its specification


def refuse_pointer(path: Path) -> None:
    """Raises DataError if the file is a pointer, OSError if it cannot be read. A missing file passes."""
    if not path.is_file() or path.stat().st_size > LONGEST:
        return
    with open(path, "rb") as file:
        refuse_pointer_text(path, file.read(len(MARK)))


def refuse_pointer_text(path: Path | str, content: bytes) -> None:
    """Does the same for a file whose content has been read."""
    if content.startswith(MARK):
        raise DataError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")

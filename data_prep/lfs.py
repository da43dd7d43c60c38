"""Git LFS pointers: small texts that a clone without `git lfs pull` has in place of files.

A module of its own: readers of every format ask it, and none of them owns it.
"""

from pathlib import Path

from data_prep.errors import DataError

MARK = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises DataError if the file is a pointer. OSError if it cannot be read."""
    with open(path, "rb") as file:
        if file.read(len(MARK)) == MARK:
            raise DataError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")

"""Git LFS pointers: small texts that a clone without `git lfs pull` has in place of files.

A module of its own: readers of every format ask it, and none of them owns it.
"""

from pathlib import Path

from data_prep.errors import DataError

MARK = b"version https://git-lfs.github.com/spec/"
LONGEST = 1024  # bytes of a pointer, by its specification


def refuse_pointer(path: Path) -> None:
    """Raises DataError if the file is a pointer; a missing file is none. OSError if it cannot be read."""
    if not path.is_file() or path.stat().st_size > LONGEST:
        return
    with open(path, "rb") as file:
        refuse_pointer_text(path, file.read(len(MARK)))


def refuse_pointer_text(path: Path, content: bytes) -> None:
    """Does the same for a file whose content has been read."""
    if content.startswith(MARK):
        raise DataError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")

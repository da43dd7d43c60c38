"""A file that grows while a run trains: apart from what is written to it, since a log must never end a training."""

import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

KEPT_BYTES = 16 << 20  # in memory, of what cannot be written


class GrowingFile:
    """Appends whole records. If that fails (disk full, folder removed, permission), one warning is printed, the records
    are kept in memory, the oldest dropped beyond KEPT_BYTES, and written as soon as that is possible again.

    The file is opened, and its folder made, with the first record. header: what a new file begins with.
    """

    def __init__(self, path: Path, header: Callable[[], bytes] = bytes) -> None:
        self.path, self._header = path, header
        self._descriptor: int | None = None
        self._waiting: deque[bytes] = deque()
        self._failing, self._dropped = False, 0

    def write(self, record: bytes) -> None:
        self._waiting.append(record)
        try:
            self._write_all()
        except OSError as error:
            if not self._failing:
                self._say(f"{error.strerror}; training goes on, and what is to be written is kept in memory")
            self._failing = True
            while sum(map(len, self._waiting)) > KEPT_BYTES:
                self._waiting.popleft()
                self._dropped += 1
        else:
            self._failing = False

    def close(self) -> None:
        if self._waiting:
            self.write(b"")
        if self._failing or self._dropped:
            self._say(f"{len(self._waiting) + self._dropped} records are lost")
        self._release()

    def _write_all(self) -> None:
        """OSError if not all could be written: the others wait."""
        descriptor = self._open()
        if os.fstat(descriptor).st_size == 0:
            _append(descriptor, self._header())
        while self._waiting:
            _append(descriptor, self._waiting[0])
            self._waiting.popleft()

    def _open(self) -> int:
        """The file of that name, which may have been removed or replaced since the last record."""
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                    return self._descriptor
            self._release()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._descriptor

    def _release(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None

    def _say(self, what: str) -> None:
        print(f"warning: {self.path}: {what}", file=sys.stderr, flush=True)


def _append(descriptor: int, record: bytes) -> None:
    """All of it or, with OSError, nothing."""
    size, left = os.fstat(descriptor).st_size, memoryview(record)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise

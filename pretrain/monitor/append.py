"""A file that grows during a run. An error while writing it must never end the training."""

import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

KEPT_BYTES = 16 << 20  # of records that cannot be written, kept in memory


class GrowingFile:
    """Appends whole records. If that fails (disk full, folder removed, permission), it prints one warning, keeps the
    records in memory, drops the oldest beyond KEPT_BYTES, and writes the rest as soon as it can.

    The first record opens the file and makes its folder. header: the first bytes of a new file.
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
                self._say(f"{error.strerror}; training goes on, and the records are kept in memory")
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
        """Writes all waiting records. Raises OSError if some could not be written; they keep waiting."""
        descriptor = self._open()
        if os.fstat(descriptor).st_size == 0:
            _append(descriptor, self._header())
        while self._waiting:
            _append(descriptor, self._waiting[0])
            self._waiting.popleft()

    def _open(self) -> int:
        """Opens the file again if it was removed or replaced since the last record."""
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
    """Appends the whole record. On an error, raises OSError and leaves nothing of it in the file."""
    size, left = os.fstat(descriptor).st_size, memoryview(record)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise

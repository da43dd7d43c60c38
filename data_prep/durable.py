"""Files that are on the disk whole, or not at all; and that one process has for itself."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.errors import DataError

BUFFER_BYTES = 1 << 20
TEMPORARY_MARK = ".tmp-"  # in every temporary name: what a killed process left behind can be told and removed


class DurableFile:
    """A file written under a temporary name beside `path`, and hashed on the way.

    `finish` puts the bytes on the disk, `publish` gives them the final name, `discard` removes every trace.
    OSError (a full disk) comes out of any of the first three.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}")
        self._stream = open(self.temporary, "wb", buffering=BUFFER_BYTES)  # noqa: SIM115
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)

    def finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def publish(self) -> None:
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        with suppress(OSError):  # on a full disk, close flushes and fails once more
            self._stream.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


@contextmanager
def durable(path: Path) -> Iterator[DurableFile]:
    """A DurableFile that is published when the block ends well, and discarded when it does not."""
    file = DurableFile(path)
    try:
        yield file
        file.finish()
        file.publish()
    except BaseException:
        file.discard()
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` for this process; it goes with the process. DataError(`busy`) if another one has it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(busy) from None
        yield


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

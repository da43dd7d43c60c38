"""Writes files that are on the disk whole or not at all; locks between processes, also on several machines."""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from data_prep.errors import DataError

BUFFER_BYTES = 1 << 20
TEMPORARY_MARK = ".tmp-"  # part of every temporary name, to recognise and remove what a killed process left behind


class DurableFile:
    """A file that is written under a temporary name beside `path`, and hashed on the way.

    `finish` syncs the bytes to the disk, the function `publish` then renames the file, `discard` removes every trace.
    `write`, `finish` and `publish` raise OSError (a full disk).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        owner = f"{socket.gethostname()}-{os.getpid()}"  # two machines may write the same file at once
        self.temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{owner}")
        self._stream = open(self.temporary, "wb", buffering=BUFFER_BYTES)  # noqa: SIM115
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)

    def finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def discard(self) -> None:
        with suppress(OSError):  # on a full disk, close flushes and fails once more
            self._stream.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)


def publish(*groups: Sequence[DurableFile]) -> None:
    """Puts all files in place, in order: the names of a group are on the disk before the next group gets its names.

    Waits for the disk once for the bytes of all files, which are synced at the same time, and once per group for its
    names. Raises OSError (a full disk): then the caller discards all files.
    """
    files = [file for group in groups for file in group]
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        list(pool.map(DurableFile.finish, files))
    for group in groups:
        for file in group:
            os.replace(file.temporary, file.path)
        for folder in dict.fromkeys(file.path.parent for file in group):
            sync_folder(folder)


@contextmanager
def durable(path: Path) -> Iterator[DurableFile]:
    """A DurableFile that is published if the block succeeds, and discarded if it raises."""
    file = DurableFile(path)
    try:
        yield file
        publish([file])
    except BaseException:
        file.discard()
        raise


@contextmanager
def durable_folder(out: Path) -> Iterator[Path]:
    """A folder to write in. It is renamed to `out` if the block succeeds, and removed if it raises.

    Removes first what a killed process has left of it. Raises DataError if `out` exists and is not empty, or if another
    process writes it.
    """
    check_new(out)
    place = out.resolve()
    unfinished = place.with_name(f"{place.name}.unfinished")
    lock = place.with_name(f"{place.name}.unfinished.lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(lock, f"out={out} is being written by another process"):
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            yield unfinished
            for folder in (unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())):
                sync_folder(folder)
            os.rename(unfinished, place)  # `out` may exist as an empty folder
            sync_folder(place.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            lock.unlink()


def check_new(out: Path) -> None:
    """Raises DataError if `out` exists, unless it is an empty folder."""
    place = out.resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise DataError(f"out={out} exists; choose another out=, nothing was overwritten")


def check_folder(key: str, path: Path) -> None:
    """Raises DataError unless `path` is a writable folder, or can be made one. Leaves nothing behind."""
    place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not place.exists():
        raise DataError(f"{key}: {place} is a link to {os.readlink(place)}, which does not exist: remove or mend it")
    if not place.is_dir():
        raise DataError(f"{key}: {place} must be a folder, but is a file")
    try:
        tempfile.TemporaryFile(dir=place).close()  # permission bits alone mean nothing to root
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk now may have room later
            raise DataError(f"{key}: {place} is not writable: {error.strerror}") from error


def check_file(key: str, path: Path) -> None:
    """Raises DataError unless `path` is a writable file, or does not exist. Does not check its folder."""
    target = Path(os.path.realpath(path))
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise DataError(f"{key}: {path} must be a file that can be written")
    if path.is_symlink() and not target.parent.is_dir():
        raise DataError(f"{key}: {path} is a link into {target.parent}, which does not exist: remove or mend it")


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exclusive(path: Path, busy: str) -> AbstractContextManager[None]:
    """Holds the lock file `path`; it is released when the process ends. Raises DataError(`busy`) if another has it."""
    return _locked(path, fcntl.LOCK_EX, busy)


def shared(path: Path, busy: str) -> AbstractContextManager[None]:
    """Holds the lock file `path` together with others that share it. Raises DataError(`busy`) if one has it
    exclusively.
    """
    return _locked(path, fcntl.LOCK_SH, busy)


@contextmanager
def _locked(path: Path, kind: int, busy: str) -> Iterator[None]:
    with open(path, "a+") as file:  # NFS wants read access for a shared lock, write access for an exclusive one
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(busy) from None
        yield


def sha256_of(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

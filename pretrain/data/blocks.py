"""Token files of a store, fetched by blocks when they are needed and kept on this node's disk.

    FOLDER/train-00000.bin   of its full size from the beginning, but sparse: only the fetched blocks take space
    FOLDER/blocks            8 bytes per block: 1 and the CRC-32 of its bytes; 0: not fetched. Then 8 bytes per file: 1
                             if it matched its hash as a whole

All processes of a node share the folder. A lock on the block's 8 bytes lets one of them fetch it; the system releases
the lock of a killed process. The bytes are written before their CRC. Each process compares a block with its CRC before
the first use, so a block that is cut short, lost in a power cut, or stale on a network file system is fetched again.
"""

import fcntl
import itertools
import mmap
import os
import queue
import random
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_prep.durable import sha256_of
from data_prep.errors import DataError, headline
from data_prep.token_file import TokenFile

BLOCK = 1 << 18  # bytes: some tens of windows; a request for less takes as long
THREADS = 10  # requests of a process at once: the connections that S3's client has
GIVE_UP_SECONDS = 300.0  # of failed attempts, until a block counts as lost
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts
POLL_SECONDS = 0.01  # between looks at a block that another process fetches
RECORDS_FILE = "blocks"
SOON, NOW = 1, 0  # priorities
_spread = random.Random()  # of its own: the state of the module's generator belongs to the training


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store. fetch(start, stop) returns its bytes; it raises DataError if another attempt cannot help, and
    any other exception if it can.
    """

    name: str
    url: str
    size: int
    sha256: str
    fetch: Callable[[int, int], bytes]


class BlockCache:
    """The blocks of files in `folder`, which `prepare` has made. Blocks have one number over all files.

    A process has one BlockCache per folder, because its locks end when it closes the file of records. Its threads are
    started by the first request.
    """

    def __init__(self, folder: Path, files: Iterable[RemoteFile]) -> None:
        self.folder, self.files = folder, [file for file in files if file.size]
        counts = [-(-file.size // BLOCK) for file in self.files]
        self._firsts = [0, *accumulate(counts)]
        self._numbers = {file.name: i for i, file in enumerate(self.files)}
        self._descriptor = os.open(folder / RECORDS_FILE, os.O_RDWR)
        size = 8 * max(1, self._firsts[-1] + len(self.files))
        # mapped to be read only: a write to a map dies by SIGBUS if the disk is full
        self._records = np.frombuffer(mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ), "<u8")
        self._have = bytearray(self._firsts[-1])  # 1: compared with its CRC by this process
        self._pending: dict[int, Future[None]] = {}
        self._running: set[int] = set()
        self._awaited: set[int] = set()  # asked for NOW
        self._mutex = threading.Lock()
        self._queue: queue.PriorityQueue[tuple[int, int, int]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._threads: list[threading.Thread] = []
        self._comparing: set[int] = set()  # numbers of the files whose hash this process computes
        self._fault: DataError | None = None

    @staticmethod
    def prepare(folder: Path, files: Iterable[RemoteFile]) -> None:
        """Makes the empty files. Raises OSError if the disk does not take files of this size."""
        records = 0
        for file in files:
            with open(folder / file.name, "ab") as stream:
                stream.truncate(file.size)
            records += -(-file.size // BLOCK) + 1
        with open(folder / RECORDS_FILE, "wb") as stream:
            stream.write(bytes(8 * max(1, records)))  # not sparse: a record must find room on a full disk

    @property
    def missing(self) -> int:
        """Bytes that were not fetched yet."""
        there = self._records[: self._firsts[-1]] != 0
        total = (self._firsts[-1] - int(there.sum())) * BLOCK
        for file, end in zip(self.files, self._firsts[1:], strict=True):
            total -= 0 if there[end - 1] else -file.size % BLOCK  # its last block is shorter
        return total

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def bytes_for(self, windows: float, tokens: int) -> int:
        """Upper bound of the bytes that these windows of `tokens` tokens bring, at 4 bytes per token."""
        return int(windows * (4 * tokens // BLOCK + 2) * BLOCK)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Starts to fetch the bytes [start, stop) of a file. Errors show when they are read."""
        self._request(self._blocks(name, start, stop), SOON)

    def wait(self, name: str, start: int, stop: int) -> None:
        """Returns when the bytes [start, stop) of a file are in the folder.

        Raises DataError if the file has changed or the disk is full, OSError if the store cannot be read.
        """
        blocks = self._blocks(name, start, stop)
        if self._fault is not None:
            raise self._fault
        if self._have.find(0, blocks.start, blocks.stop) < 0:
            return
        for future in self._request(blocks, NOW):
            try:
                future.result(2 * GIVE_UP_SECONDS)
            except TimeoutError as error:
                url = self.files[self._numbers[name]].url
                raise ConnectionError(f"{url}: no answer for {2 * GIVE_UP_SECONDS:g} s") from error

    def _blocks(self, name: str, start: int, stop: int) -> range:
        number = self._numbers.get(name)
        if number is None or start >= stop:
            return range(0)
        first = self._firsts[number]
        return range(first + start // BLOCK, first + (stop - 1) // BLOCK + 1)

    def _request(self, blocks: range, priority: int) -> list["Future[None]"]:
        futures = []
        with self._mutex:
            if self._fault is not None:
                raise self._fault
            for block in blocks:
                if self._have[block]:
                    continue
                if priority == NOW:
                    self._awaited.add(block)
                known = self._pending.get(block)
                if known is None or (priority == NOW and block not in self._running):
                    self._queue.put((priority, next(self._order), block))
                futures.append(known or self._pending.setdefault(block, Future()))
            if futures and not self._threads:
                self._threads = [threading.Thread(target=self._work, daemon=True, name="fetch") for _ in range(THREADS)]
                for thread in self._threads:
                    thread.start()
        return futures

    def _work(self) -> None:
        while True:
            *_, block = self._queue.get()
            with self._mutex:
                future = self._pending.get(block)
                if future is None or block in self._running:  # asked for twice
                    continue
                self._running.add(block)
            error, there = None, True
            try:
                there = self._bring(block)
            except BaseException as found:
                error = found
            with self._mutex:
                self._running.discard(block)
                if not there:  # another process fetches it: this thread takes another one meanwhile
                    self._queue.put((NOW if block in self._awaited else SOON, next(self._order), block))
                else:
                    self._have[block] = error is None
                    self._awaited.discard(block)
                    del self._pending[block]
            if not there:
                time.sleep(POLL_SECONDS)
                continue
            future.set_result(None) if error is None else future.set_exception(error)
            if error is None:
                self._check_whole(block)

    def _place(self, block: int) -> tuple[RemoteFile, int, int]:
        """Returns the file of a block, its first byte there, and its number of bytes."""
        number = bisect_right(self._firsts, block) - 1
        file, start = self.files[number], (block - self._firsts[number]) * BLOCK
        return file, start, min(BLOCK, file.size - start)

    def _stored(self, block: int) -> bool:
        record = int(self._records[block])
        if not record:
            return False
        file, start, size = self._place(block)
        with open(self.folder / file.name, "rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), size, start)
        return record == _record(data)

    def _bring(self, block: int) -> bool:
        """Stores the block. Returns False if another process fetches it and no reader waits for it here."""
        if self._stored(block):
            return True
        while not self._lock(block):
            if block not in self._awaited:
                return False
            time.sleep(POLL_SECONDS)
        try:
            if self._stored(block):  # by another process, meanwhile
                return True
            file, start, size = self._place(block)
            data = attempted(file, start, start + size)
            try:
                if self._records[block]:  # it is damaged, so the file is no longer complete
                    self._write(block, 0)
                    self._write(self._firsts[-1] + bisect_right(self._firsts, block) - 1, 0)
                with open(self.folder / file.name, "r+b") as stream:
                    stream.seek(start)
                    stream.write(data)
                self._write(block, _record(data))
            except OSError as error:
                raise DataError(
                    f"{self.folder} cannot be written: {error.strerror}; data.cache must be on a disk with room for"
                    f" {self.missing / 2**30:.1f} GiB more"
                ) from error
            return True
        finally:
            self._unlock(block)

    def _write(self, record: int, value: int) -> None:
        os.pwrite(self._descriptor, value.to_bytes(8, "little"), 8 * record)

    def _lock(self, record: int) -> bool:
        """Locks a record against other processes. Returns False if one of them has it. `lockf` could wait itself, but
        sees deadlocks between the threads of two processes where there are none.
        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 8, 8 * record)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            return False
        return True

    def _unlock(self, record: int) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 8, 8 * record)

    def _check_whole(self, block: int) -> None:
        """Compares the file of the block with its hash if all its blocks are there, and no process has done it yet."""
        number = bisect_right(self._firsts, block) - 1
        blocks, mark = range(*self._firsts[number : number + 2]), self._firsts[-1] + number
        if self._records[mark] or not self._records[blocks.start : blocks.stop].all():
            return
        with suppress(OSError):  # the folder was removed
            with self._mutex:
                if number in self._comparing or not self._lock(mark):
                    return
                self._comparing.add(number)
            try:
                self._compare(self.files[number], blocks, mark)
            finally:
                self._comparing.discard(number)
                self._unlock(mark)

    def _compare(self, file: RemoteFile, blocks: range, mark: int) -> None:
        damaged: list[int] = []
        for _ in range(2):  # another process may have mended a block meanwhile
            if sha256_of(self.folder / file.name) == file.sha256:
                self._write(mark, 1)
                return
            damaged = damaged or [block for block in blocks if not self._stored(block)]  # here, not in the store
        for block in damaged or blocks:
            self._have[block] = 0
            self._write(block, 0)
        if not damaged:  # others are fetched when they are read, and then the file is compared again
            self._fault = DataError(
                f"{file.url}: its sha256 does not match the manifest: the file in the store is damaged, or of another"
                " corpus; upload the folder again"
            )


def attempted(file: RemoteFile, start: int, stop: int) -> bytes:
    """Fetches bytes, again and again with growing pauses. Raises DataError if another attempt cannot help,
    ConnectionError after GIVE_UP_SECONDS.
    """
    late, pause = time.monotonic() + GIVE_UP_SECONDS, FIRST_PAUSE
    while True:
        try:
            data = file.fetch(start, stop)
            if len(data) == stop - start:
                return data
            fault = f"{len(data)} bytes came instead of {stop - start}"
        except DataError:
            raise
        except Exception as error:  # each protocol's client raises its own
            fault = f"{type(error).__name__}: {headline(error)}"
        if time.monotonic() + pause > late:
            raise ConnectionError(
                f"{file.url}: cannot be read for {GIVE_UP_SECONDS:g} s: {fault}; the same command resumes the run when"
                " the store answers again"
            )
        time.sleep(pause * _spread.uniform(0.5, 1))  # not all ranks at once
        pause = min(2 * pause, LONGEST_PAUSE)


def _record(data: bytes) -> int:
    return 1 << 32 | zlib.crc32(data)


class RemoteTokenFile(TokenFile):
    """A token file whose index is on the disk, and whose tokens are fetched when they are read."""

    def __init__(self, prefix: Path, cache: BlockCache) -> None:
        self._cache, self._name = cache, f"{prefix.name}.bin"
        super().__init__(prefix)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens. Waits until all are fetched."""
        return self.read(0, self.size)

    def read(self, start: int, stop: int) -> np.ndarray:
        self._cache.wait(self._name, start * self._itemsize, min(stop, self.size) * self._itemsize)
        return super().read(start, stop)

    def prefetch(self, start: int, stop: int) -> None:
        self._cache.prefetch(self._name, start * self._itemsize, min(stop, self.size) * self._itemsize)

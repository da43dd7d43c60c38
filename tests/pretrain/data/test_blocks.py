"""BlockCache: damage on the disk, kills and full disks. The store is a function here; test_remote.py has a real one."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.errors import DataError
from pretrain.data import blocks
from pretrain.data.blocks import BlockCache, RemoteFile

SMALL_BLOCK = 512
CONTENT = os.urandom(7 * SMALL_BLOCK + 100)
NAME = "a.bin"
RIGHT, WRONG = hashlib.sha256(CONTENT).hexdigest(), "0" * 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", SMALL_BLOCK)


def opened(folder: Path, sha256: str = RIGHT) -> BlockCache:
    """Opens the cache as another process would; makes it if it is not there."""
    file = RemoteFile(NAME, f"s3://b/{NAME}", len(CONTENT), sha256, lambda start, stop: CONTENT[start:stop])
    if not (folder / NAME).exists():
        folder.mkdir(exist_ok=True)
        BlockCache.prepare(folder, [file])
    return BlockCache(folder, [file])


def until(true: Callable[[], object]) -> None:
    late = time.monotonic() + 10
    while not true():
        assert time.monotonic() < late
        time.sleep(0.01)


def compared(cache: BlockCache) -> bool:
    return bool(cache._records[-1])


def test_damage_on_the_disk_is_not_blamed_on_the_store(tmp_path):
    first = opened(tmp_path)
    first.wait(NAME, 0, len(CONTENT))
    until(lambda: compared(first))
    with open(tmp_path / NAME, "r+b") as file:  # as a power cut may leave it: blocks are lost, their records are not
        for block in (2, 5):
            file.seek(block * SMALL_BLOCK)
            file.write(bytes(SMALL_BLOCK))
    second = opened(tmp_path)
    second.wait(NAME, 2 * SMALL_BLOCK, 3 * SMALL_BLOCK)
    until(lambda: second.missing)
    assert second.missing == SMALL_BLOCK  # the other one, and nothing that is right
    second.wait(NAME, 0, len(CONTENT))
    until(lambda: compared(second))
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_file_of_a_killed_process_is_compared_by_the_next(tmp_path, monkeypatch):
    def killed(path: Path) -> str:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "sha256_of", killed)
        first = opened(tmp_path, WRONG)
        first.wait(NAME, 0, len(CONTENT))
        until(lambda: not first._pending and not first._comparing)
    second = opened(tmp_path, WRONG)
    second.wait(NAME, 0, 1)
    until(lambda: second._fault)
    with pytest.raises(DataError, match=rf"s3://b/{NAME}: its sha256 does not match the manifest"):
        second.wait(NAME, 0, 1)
    assert second.missing == len(CONTENT)  # all is fetched again, from a store that may be mended by then


def test_full_disk_names_the_cache(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        assert not os.environ.get("CI"), "CI must try a full disk: it needs the right to mount one"
        pytest.skip("mounting a tmpfs needs root: the full disk is not tried")
    try:
        cache = opened(disk / "cache")
        with pytest.raises(OSError), open(disk / "other", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        rule = "cannot be written: No space left on device; data.cache must be on a disk with room"
        with pytest.raises(DataError, match=rf"{disk}/cache {rule} for 0.0 GiB more"):
            cache.wait(NAME, 0, 1)
        (disk / "other").unlink()
        cache.wait(NAME, 0, len(CONTENT))
        until(lambda: compared(cache))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX, 8, 0)
print(flush=True)
sys.stdin.read()
"""


def test_thread_takes_another_block_if_a_process_fetches_one(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "THREADS", 1)
    cache = opened(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path / blocks.RECORDS_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()
        cache.prefetch(NAME, 0, len(CONTENT))
        until(lambda: cache.missing == SMALL_BLOCK)
        waiting = threading.Thread(target=cache.wait, args=(NAME, 0, 1))
        waiting.start()
        until(lambda: 0 in cache._awaited)
        assert cache.missing == SMALL_BLOCK
        other.stdin.close()
    waiting.join(30)
    assert not cache.missing and not waiting.is_alive()

"""Tests the order in which files reach the disk: a power cut must not leave a name without its bytes."""

import errno
import os
from pathlib import Path

import pytest

from data_prep.durable import DurableFile, publish


def written(*paths: Path) -> list[DurableFile]:
    files = [DurableFile(path) for path in paths]
    for file in files:
        file.write(file.path.name.encode())
    return files


def test_bytes_are_synced_before_names_and_each_group_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.partition(".tmp-")[0]))

    def renamed(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == target.name.encode()
        replace(source, target)
        events.append(("name", target.name))

    last = tmp_path / "records"
    last.mkdir()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    publish(written(tmp_path / "a", tmp_path / "b"), written(last / "c"))
    assert sorted(events[:3]) == [("sync", "a"), ("sync", "b"), ("sync", "c")]
    assert events[3:] == [
        ("name", "a"),
        ("name", "b"),
        ("sync", tmp_path.name),
        ("name", "c"),
        ("sync", last.name),
    ]


def test_a_file_that_cannot_be_synced_gives_no_file_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = written(tmp_path / "a", tmp_path / "b")

    def full(self: DurableFile) -> None:
        if self is files[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DurableFile, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        publish(files)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    for file in files:
        file.discard()
    assert not list(tmp_path.iterdir())

"""Tests which paths are files of a corpus, and the messages for unreadable ones."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.source import expand, local_file, local_files
from tests.data_prep.commands import write_jsonl


def paths_of(*names: Path | str) -> list[str]:
    return [file.path for file in expand(list(map(str, names)))]


GLOBS = [
    "*",
    "**",
    "**/*",
    "*/**",
    "**/*.txt",
    "a/**/*.txt",
    "**/a/*",
    "?/*/[!b].*",
    ".*",
    ".h/**",
    "**/.e",
    "./a/../*",
]
GLOBS += ["a/b/a.txt", "*/b/a.txt", "**/**/c.md", "[[]1].txt", "*/", "a//*", "", "nothing/*", "a.txt/*"]


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_match_python_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """Compares with Python's `glob`, which is silent about unreadable folders; relative and absolute patterns."""
    for name in ("a.txt", "[1].txt", "a/b.txt", "a/b/a.txt", "a/b/c.md", "b/a/b/.e", "b/c.md", ".h/a.txt", ".e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for name in (pattern, f"{tmp_path}/{pattern}"):
        if not os.path.isdir(name):
            expected = [path for path in glob.glob(name, recursive=True) if os.path.isfile(path)]
            assert local_files(name) == [local_file(path) for path in sorted(set(map(Path, expected)))]


def test_links_are_followed_and_each_file_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for name in ("data/a.jsonl", "data/sub/b.jsonl", "elsewhere.jsonl"):
        write_jsonl(tmp_path / name, ["one", "two"])
    for link, target in (("l.jsonl", "../elsewhere.jsonl"), ("linked", "sub"), ("sub/up", ".."), ("sub/round", ".")):
        (data / link).symlink_to(target)
    assert paths_of(data) == [f"{data}/{name}" for name in ("a.jsonl", "l.jsonl", "sub/b.jsonl")]
    assert paths_of(data / "**" / "*.jsonl") == paths_of(data)
    assert (
        paths_of(data / "sub" / "b.jsonl", data)[0] == f"{data}/sub/b.jsonl" and len(paths_of(data / "sub", data)) == 3
    )
    monkeypatch.chdir(data)
    assert paths_of("a.jsonl", f"{data}/a.jsonl", "sub/../a.jsonl", "sub/up/a.jsonl") == ["a.jsonl"]


@pytest.mark.parametrize("name", ["data", "data/*", "data/**/*.jsonl", "data/*/*.jsonl", "data/x.jsonl"])
def test_dangling_link_is_named(tmp_path: Path, name: str) -> None:
    """Covers a cache without its files, or a disk that is not mounted."""
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "data").symlink_to(tmp_path)
    (tmp_path / "x.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"data/x\.jsonl: cannot be read: it is a dangling link"):
        expand([f"{tmp_path}/{name}"])
    assert paths_of(tmp_path / "a.*") == [f"{tmp_path}/a.jsonl"]


def test_non_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt: cannot be read: neither a file nor a folder"):
        expand([str(tmp_path)])


@contextmanager
def unprivileged() -> Iterator[None]:
    """Runs the block as a user without permission to read everything."""
    root = os.getuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


@pytest.mark.parametrize("locked", ["data/locked", "data/a.jsonl"])
@pytest.mark.parametrize("name", ["data", "data/**/*.jsonl", "data/*/c.jsonl", "data/locked/c.jsonl", "data/a.*"])
def test_file_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, locked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    Path("data/locked").mkdir(parents=True)
    write_jsonl(Path("data/a.jsonl"), ["one"])
    write_jsonl(Path("data/locked/c.jsonl"), ["two"])
    expected = paths_of(name)
    os.chmod(locked, 0)
    with unprivileged():
        if any(path.startswith(locked) for path in expected):
            with pytest.raises(DataError, match=f"{locked}.*cannot be read|cannot be read: PermissionError.*{locked}"):
                expand([name])
        else:
            assert paths_of(name) == expected
    os.chmod(locked, 0o755)

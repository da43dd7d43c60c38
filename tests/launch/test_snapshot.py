"""Snapshots of the code: complete, named by content, and imported by the job's Python."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import snapshot
from launch.snapshot import COMMIT, DIFF, FOLDERS, Snapshot, import_from


@pytest.fixture
def root(tmp_path) -> Path:
    """Makes a small tree: a file per folder, and files that are not code."""
    for folder in FOLDERS:
        (tmp_path / "house" / folder / "__pycache__").mkdir(parents=True)
        (tmp_path / "house" / folder / "__init__.py").write_text(f"here = '{folder}'\n")
        (tmp_path / "house" / folder / "__pycache__" / "old.pyc").write_text("no code")
    (tmp_path / "house" / "runs").mkdir()
    return tmp_path / "house"


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *who, *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_without_git_it_is_the_code_and_says_so(root, tmp_path):
    saved = Snapshot.take(root).save(tmp_path / "code")
    code = {f"{folder}/__init__.py": f"here = '{folder}'\n" for folder in FOLDERS}
    assert contents(saved) == code | {COMMIT: "none: not a checkout of git's\n", DIFF: ""}
    assert Snapshot.take(root).commit == "none: not a checkout of git's"


def test_in_a_checkout_commit_and_difference_are_kept(root, tmp_path):
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "one")
    commit = git(root, "rev-parse", "HEAD").strip()
    assert Snapshot.take(root).commit == commit
    (root / "launch" / "__init__.py").write_text("changed = 1\n")
    (root / "launch" / "new.py").write_text("new = 1\n")
    changed = Snapshot.take(root)
    assert changed.commit == f"{commit} with changes"
    saved = changed.save(tmp_path / "code")
    assert (saved / COMMIT).read_text() == f"{commit}\n" and (saved / "launch" / "new.py").exists()
    git(root, "checkout", ".")
    git(root, "apply", str(saved / DIFF))
    assert (root / "launch" / "__init__.py").read_text() == "changed = 1\n", "the difference can be applied"


def test_enclosing_repository_is_not_recorded(root):
    git(root.parent, "init")
    (root.parent / "notes").write_text("theirs")
    git(root.parent, "add", "notes")
    git(root.parent, "commit", "-m", "theirs")
    assert Snapshot.take(root).commit.startswith("none")


def test_the_same_code_has_the_same_name_and_is_kept_once(root, tmp_path):
    first = Snapshot.take(root).save(tmp_path / "code")
    assert Snapshot.take(root).save(tmp_path / "code") == first
    (root / "launch" / "__init__.py").write_text("changed = 1\n")
    other = Snapshot.take(root).save(tmp_path / "code")
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == sorted([first.name, other.name])
    assert "changed" not in (first / "launch" / "__init__.py").read_text(), "what a job runs stays as it was"


def test_a_full_disk_leaves_nothing(root, tmp_path, monkeypatch):
    taken = Snapshot.take(root)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.os, "fsync", full)
    with pytest.raises(OSError):
        taken.save(tmp_path / "code")
    assert not list((tmp_path / "code").iterdir())


def test_two_launchers_at_once_keep_one(root, tmp_path):
    taken = Snapshot.take(root)
    threads = [threading.Thread(target=taken.save, args=[tmp_path / "code"]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in (tmp_path / "code").iterdir()] == [taken.name]


def test_job_imports_the_snapshot_only(root, tmp_path):
    saved = Snapshot.take(root).save(tmp_path / "code")
    (root / "launch" / "__init__.py").write_text("here = 'edited since'\n")
    python = f"{import_from(saved)}; {sys.executable} -c 'import launch; print(launch.here)'"
    done = subprocess.run(["bash", "-c", python], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "launch\n", done.stderr

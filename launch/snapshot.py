"""Snapshots the code for a run: its jobs start from the snapshot, so later edits do not change them."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_prep.durable import TEMPORARY_MARK, sync_folder

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pretrain", "data_prep", "launch", "conf")
COMMIT, DIFF = "COMMIT", "DIFF"


@dataclass(frozen=True)
class Snapshot:
    """The code of the packages and of conf/, with its commit and the diff against it."""

    files: dict[str, bytes]  # contents by path; also COMMIT and DIFF

    @classmethod
    def take(cls, root: Path = ROOT) -> "Snapshot":
        """Reads the folder. If it is not a git checkout, COMMIT says so."""
        files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for folder in FOLDERS
            for path in sorted((root / folder).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts and TEMPORARY_MARK not in path.name
        }
        return cls(files | git_says(root))

    @property
    def name(self) -> str:
        """Hash of the content: equal code has an equal name."""
        content = hashlib.sha256()
        for path, data in self.files.items():
            content.update(f"{path}\0{len(data)}\0".encode() + data)
        return content.hexdigest()[:12]

    @property
    def commit(self) -> str:
        return self.files[COMMIT].decode().strip() + (" with changes" if self.files[DIFF] else "")

    def save(self, folder: Path) -> Path:
        """Writes folder/NAME atomically. An existing one is equal, and is kept."""
        target = folder / self.name
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_MARK, dir=folder))
        try:
            temporary.chmod(0o755)
            for name, data in self.files.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
            for path in temporary.rglob("*"):
                if path.is_dir():
                    sync_folder(path)
            sync_folder(temporary)
            try:
                temporary.rename(target)
            except OSError:
                if not target.exists():  # otherwise another launcher has written the same code
                    raise
            sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target


def import_from(code: Path) -> str:
    """Returns a script line that makes Python import a snapshot's packages, and none from the current folder."""
    return f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"


def git_says(root: Path) -> dict[str, bytes]:
    """Returns the commit, and the diff of the working tree against it. Untracked files are in the snapshot itself."""
    try:
        top = _git(root, "rev-parse", "--show-toplevel").decode().strip()
        if Path(top).resolve() != root.resolve():  # installed inside another repository
            raise OSError
        return {COMMIT: _git(root, "rev-parse", "HEAD"), DIFF: _git(root, "diff", "--binary", "HEAD", "--", *FOLDERS)}
    except (OSError, subprocess.CalledProcessError):
        return {COMMIT: b"none: not a checkout of git's\n", DIFF: b""}


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True, timeout=60).stdout

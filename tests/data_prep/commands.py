"""Runs the command as a user does, and makes small inputs for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from data_prep import app
from data_prep.bpe import PATTERNS
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec
from tests.in_process import in_process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "data_prep" / "tokenize.py"
TIMEOUT = 60


def python(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user does: no PYTHONPATH, no pytest in the environment."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HYDRA"))}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        start_new_session=True,
    )


def tokenize(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(SCRIPT, *arguments, cwd=cwd, **environment)


def tokenize_here(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command in the test's own process, for mistakes and for commands without workers."""
    return in_process(app.main, *arguments, cwd=cwd)


def assert_one_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Asserts exit code 2, and one line on stderr that contains each part."""
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]


def small_spec(words: tuple[str, ...] = ("th", "the", " the")) -> TokenizerSpec:
    """A tokenizer of all bytes and a few merges, made without training."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {word.encode(): 256 + i for i, word in enumerate(words)}
    return TokenizerSpec("small", PATTERNS["gpt2"], {END_OF_DOCUMENT: len(ranks)}, ranks)


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of a few hundred to a few thousand characters, some not ASCII."""
    random = np.random.default_rng(seed)
    words = ["the", "loss", "of", "rows", "Zürich", "东京", "\n", "  ", "42", "<|endoftext|>", "🙂"]
    return [" ".join(random.choice(words, random.integers(50, 600))) + f" {i}" for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The content of every file below the folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }

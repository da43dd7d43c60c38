"""Kills a run with signal 9 at random moments, many times; the output must match an undisturbed run.

python -m tests.data_prep.kills 20 [seed]
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.data_prep.commands import SCRIPT, folder_bytes, small_spec, texts

PATIENCE = 120.0


def corpus_of(folder: Path) -> list[str]:
    """A command without `out=`: 2 MB in about 40 units, with bad documents and duplicates across units."""
    documents = texts(1000)
    rows = [{"text": text} for text in [*documents, *documents[::7]]] + [{"text": None}, {"text": 7}]
    random.Random(0).shuffle(rows)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small_spec().save(folder / "tokenizer")
    return [
        "corpus=files",
        f"corpus.paths=['{folder / 'a.jsonl'}']",
        "tokenizer=file",
        f"tokenizer.path={folder / 'tokenizer'}",
        "clean.deduplicate=true",
        "unit_mib=0.05",
    ]


def start(command: list[str], out: Path, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *command, f"workers={workers}", f"out={out}"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said + errors


def killed_again_and_again(folder: Path, kills: int, seed: int) -> list[int]:
    """The number of finished units after each kill. Raises AssertionError if the final bytes differ."""
    command, chance = corpus_of(folder), random.Random(seed)
    begin = time.monotonic()
    finish(start(command, folder / "plain", workers=1))
    seconds, plain, out, left = time.monotonic() - begin, folder_bytes(folder / "plain"), folder / "out", list[int]()
    while len(left) < kills:
        process = start(command, out, workers=chance.choice([1, 2, 3]))
        try:
            process.wait(timeout=chance.uniform(0.2, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=PATIENCE)
            left.append(len(list(out.glob("unfinished/[0-9]*.json"))))
        else:
            assert folder_bytes(out) == plain
            shutil.rmtree(out)
    finish(start(command, out, workers=2))
    assert folder_bytes(out) == plain
    return left


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        units = killed_again_and_again(Path(name), int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0]))
        print(f"{len(units)} kills; units done at each: {units}; the bytes match a plain run")

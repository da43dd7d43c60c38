"""Tests the comparison of two fingerprints. Making one takes minutes and is not tested."""

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOSS = 5.977637887001038


def fingerprint(loss: float = LOSS, digest: str = "ab", case: str = "fsdp2, 1 rank") -> dict:
    return {case: {"numbers": {"step 1 loss": loss.hex()}, "files": {"step-00000006/manifest.json": digest}}}


def compared(folder: Path, ours: dict, theirs: dict, *options: str) -> subprocess.CompletedProcess:
    for name, cases in (("a", ours), ("b", theirs)):
        (folder / f"{name}.json").write_text(json.dumps(cases))
    command = [sys.executable, "tests/fingerprint.py", "--compare", f"{folder}/a.json", f"{folder}/b.json", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_equal_bits_are_identical(tmp_path):
    done = compared(tmp_path, fingerprint(), fingerprint())
    assert (done.returncode, done.stdout) == (0, "1 cases, 1 numbers, 1 files: identical\n"), done.stderr


def test_changed_bit_of_a_loss_is_named(tmp_path):
    other = math.nextafter(LOSS, math.inf)
    done = compared(tmp_path, fingerprint(), fingerprint(other))
    assert done.returncode == 1, done.stderr
    assert f"step 1 loss: {LOSS.hex()} ({LOSS!r}) is not {other.hex()} ({other!r})" in done.stdout
    assert done.stdout.endswith("1 of 1 cases differ\n")


def test_changed_file_is_named(tmp_path):
    done = compared(tmp_path, fingerprint(), fingerprint(digest="cd"))
    assert done.returncode == 1 and "step-00000006/manifest.json: ab is not cd" in done.stdout


def test_missing_case_is_a_difference(tmp_path):
    both = fingerprint() | fingerprint(case="untied")
    done = compared(tmp_path, fingerprint(), both)
    assert done.returncode == 1 and "untied: only in the second file" in done.stdout
    assert compared(tmp_path, fingerprint(), both, "--only", "fsdp2").returncode == 0


def test_empty_comparison_fails(tmp_path):
    assert compared(tmp_path, fingerprint(), fingerprint(), "--only", "llama").returncode == 1

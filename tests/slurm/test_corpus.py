"""Tokenising as jobs of a real Slurm: the bytes of a plain run, also without a part; and a failure that ends all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.verify import verify
from tests.data_prep.commands import ROOT, SCRIPT, folder_bytes, texts, write_jsonl
from tests.slurm.cluster import Slurm

PATIENCE = 120.0
CORPUS = ["corpus=files", "corpus.paths=[a.jsonl]", "tokenizer=bpe", "tokenizer.vocab_size=300", "unit_mib=0.1"]
CLUSTER = ["+cluster=cpu", "cluster.tasks=3", "cluster.cpus_per_task=1", "cluster.time=0:10:00"]
LAUNCH = [ROOT / "launch" / "slurm.py", "--config-name", "tokenize", *CLUSTER]


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path):
    """The command, given in a folder with a corpus of 0.7 MB in 7 units."""
    write_jsonl(tmp_path / "a.jsonl", texts(400))

    def run(*settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *LAUNCH, *CORPUS, "out=out", *settings],
            cwd=tmp_path,
            env=slurm.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


def job(name: str, said: str) -> str:
    found = re.search(rf"^{name}: job (\d+) ", said, re.MULTILINE)
    assert found, said
    return found[1]


def states(slurm: Slurm, ids: str) -> list[str]:
    return slurm.call("squeue", "--noheader", "--states=all", "--array", f"--jobs={ids}", "--format=%T").split()


def test_token_files_equal_a_local_run_even_if_a_part_fails(slurm: Slurm, submit, tmp_path: Path) -> None:
    submitted = submit()
    assert submitted.returncode == 0, submitted.stderr
    parts, manifest = job("parts", submitted.stdout), job("manifest", submitted.stdout)
    slurm.call("scancel", f"{parts}_1")
    again = submit()
    assert again.returncode == 2 and f"out=out is in use by job {manifest}" in again.stderr

    slurm.wait_until(lambda: states(slurm, manifest) == ["COMPLETED"], PATIENCE)
    assert set(states(slurm, parts)) == {"COMPLETED"}
    (log,) = (tmp_path / "out.slurm").glob(f"{manifest}_*.out")
    assert not list((tmp_path / "out.slurm").glob(f"{parts}_1_*.out")) and "MB/s" in log.read_text()  # what 1/3 left
    plain = [sys.executable, SCRIPT, *CORPUS, "out=plain", "workers=1"]
    subprocess.run(plain, cwd=tmp_path, check=True, capture_output=True, timeout=PATIENCE)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "plain")
    assert verify(tmp_path / "out") == []


def test_no_part_runs_without_a_tokenizer(slurm: Slurm, submit, tmp_path: Path) -> None:
    submitted = submit("tokenizer.pattern='('", "tail=true")
    assert "tokenizer.pattern='(' must be a regular expression" in submitted.stdout, submitted
    ids = [job(name, submitted.stdout) for name in ("prepare", "parts", "manifest")]
    slurm.wait_until(lambda: states(slurm, ids[2]) == ["CANCELLED"], PATIENCE)
    assert states(slurm, ids[0]) == ["FAILED"] and set(states(slurm, ids[1])) == {"CANCELLED"}
    assert submitted.returncode == 2 and not (tmp_path / "out").exists()

"""Each process of a run imports the code of the typed command, whatever the current folder contains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.supervisor import Supervisor
from pretrain.stops import StopRequests
from tests.pretrain.tiny import write_tokens

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pretrain", "data_prep", "launch")
SMALL = "model.layers=2 model.width=32 model.heads=2 model.context=32 train.global_batch=8 train.precision=fp32"
SHADOWS = (*PACKAGES, "torch", "yaml", "numpy", "tokenize", "socket")


@pytest.fixture
def elsewhere(tmp_path):
    """Makes a folder with modules named as ours and as those that ours import."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder was imported')\n")
    return folder


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = known | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("path", ["", ":", "{cwd}"], ids=["no PYTHONPATH", "an empty entry", "the folder itself"])
def test_ranks_run_the_launchers_code(elsewhere, monkeypatch, path):
    """An empty entry of PYTHONPATH means the current folder."""
    for name in set(SHADOWS) - set(PACKAGES):
        (elsewhere / f"{name}.py").unlink()
    monkeypatch.chdir(elsewhere)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONPATH": path.format(cwd=elsewhere)} if path else {}
    code = "import pretrain.exits, sys; print(pretrain.exits.__file__, file=sys.stderr)"
    (record,) = Supervisor([sys.executable, "-c", code], {0: environment}, StopRequests()).run()
    assert record.last == str(ROOT / "pretrain" / "exits.py")


def test_a_run_starts_from_a_folder_with_modules_of_the_same_names(elsewhere, tmp_path):
    prefix = write_tokens(tmp_path / "tokens", vocab_size=97)
    settings = f"nproc=1 data.path={prefix} vocab.size=97 run.dir={tmp_path}/run train.steps=1 {SMALL}"
    done = python(str(ROOT / "launch" / "local.py"), *settings.split(), cwd=elsewhere)
    assert done.returncode == 0, done.stderr


def test_workers_start_from_a_folder_with_modules_of_the_same_names(elsewhere, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n")
    settings = f"corpus=files corpus.paths=[{tmp_path}/a.txt] tokenizer=gpt2 out={tmp_path}/out workers=2"
    settings = settings.replace("tokenizer=gpt2", "tokenizer=bpe tokenizer.vocab_size=257")
    done = python(str(ROOT / "data_prep" / "tokenize.py"), *settings.split(), cwd=elsewhere)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["launch/local.py", "data_prep/tokenize.py"])
def test_a_command_of_another_checkout_runs_its_own_code(tmp_path, command):
    """One checkout is on PYTHONPATH, the other is named: with an editable install both are on the path."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        for name in PACKAGES:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", ours / "conf")
    for name in PACKAGES:
        (theirs / name / "__init__.py").write_text("raise SystemExit('the code of the other checkout runs')\n")
    done = python(str(ours / command), "--help", cwd=theirs, PYTHONPATH=f"{theirs}:{ours}")
    assert done.returncode == 0, done.stderr

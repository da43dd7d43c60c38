"""`python -m pretrain.checkpoint`, as users type it; mostly inside the test's process."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.folder import write_manifest
from pretrain.commands import checkpoint as program
from tests.in_process import in_process
from tests.pretrain.checkpoint.test_manager import SECOND, flip, save
from tests.ranks import run_ranks


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return in_process(program.main, *arguments)


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Path:
    """A run of two ranks with checkpoints 2, 4 ... 12. The best is 4."""
    run = tmp_path_factory.mktemp("six")
    run_ranks(2, save, run, {}, range(2, 13, 2))
    for folder in checkpoints(run):
        manifest = read_manifest(folder)
        manifest["val_loss"] = {2: None, 4: 1.25}.get(manifest["step"], 2.0)
        manifest["config"] = {"engine": {"name": "fsdp2"}, "checkpoint": {"every": 2, "keep": 3}}
        write_manifest(folder, manifest)
    return run


@pytest.fixture
def run(six, tmp_path) -> Path:
    return Path(shutil.copytree(six, tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in checkpoints(run)]


def test_process_lists_or_exits_with_2(run):
    call = [sys.executable, "-m", "pretrain.checkpoint", "list", f"run={run}"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 7
    done = subprocess.run([*call[:-1], "run=/nowhere"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: run=/nowhere has no checkpoint: /nowhere does not exist\n",
    )


def test_list_shows_every_checkpoint(run):
    (checkpoints(run)[0] / "manifest.json").write_text("{")
    checkpoints(run)[-1].rename(run / "checkpoints/damaged-step-00000012")
    done = command("list", f"run={run}")
    assert done.returncode == 0, done.stderr
    header, *rows, aside = done.stdout.splitlines()
    assert header.split() == ["step", "date", "MiB", "samples", "val", "loss", "ranks", "engine"]
    assert "is not a checkpoint's manifest" in rows[0]
    step, date, size, samples, loss, *ranks, engine = rows[1].split()
    manifest = read_manifest(checkpoints(run)[1])
    assert (step, date, samples, loss, engine) == ("4", manifest["date"], "11", "1.2500", "fsdp2")
    assert float(size) == pytest.approx(sum(f["bytes"] for f in manifest["files"].values()) / 2**20, abs=0.06)
    assert " ".join(ranks) == "1 dp × 2 vocab" and len(rows) == 5
    assert aside.startswith("set aside: ") and aside.endswith("damaged-step-00000012")
    assert len(command("list", f"run={run}", "step=4").stdout.splitlines()) == 3


def test_verify_names_every_fault(run):
    assert command("verify", f"run={run}").returncode == 0
    two, four, six, *_ = checkpoints(run)
    flip(two / SECOND, -1)
    os.truncate(two / SECOND.replace("2", "1", 1), 10)
    (four / SECOND).unlink()
    shutil.copy(two / SECOND, four / "x.safetensors")
    (six / "manifest.json").unlink()
    done = command("verify", f"run={run}")
    assert done.returncode == 1
    faults = done.stderr.splitlines()
    assert len(faults) == 5
    for folder, expected in [
        (two, f"{SECOND} is damaged"),
        (two, "10 bytes, but"),
        (four, f"{SECOND} is missing"),
        (four, "x.safetensors is not in the manifest"),
        (six, "manifest.json is missing"),
    ]:
        assert any(str(folder) in fault and expected in fault for fault in faults), expected
    assert done.stdout.count(": whole") == 3 and done.stdout.count("2 fault(s)") == 2
    assert command("verify", f"run={run}", "step=8").returncode == 0
    assert command("verify", f"run={run}", "step=4").returncode == 1


@pytest.mark.parametrize(
    "rules,left",
    [
        ([], [8, 10, 12]),
        (["keep=1"], [12]),
        (["keep=1", "keep_best=1"], [4, 12]),
        (["keep=2", "keep_every=6"], [6, 10, 12]),
        (["keep=0"], [2, 4, 6, 8, 10, 12]),
    ],
)
def test_prune_follows_rules(run, rules, left):
    (run / "checkpoints/.tmp-step-00000014").mkdir()
    done = command("prune", f"run={run}", *rules)
    assert done.returncode == 0, done.stderr
    assert steps(run) == left
    assert len(list((run / "checkpoints").iterdir())) == len(left)
    assert f"{len(left)} checkpoints kept" in done.stdout


def test_prune_keeps_damaged_checkpoints_and_running_runs(run):
    (checkpoints(run)[0] / "manifest.json").write_text("{")
    with open(run / ".ranks.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = command("prune", f"run={run}", "keep=1")
        assert done.returncode == 2 and "is in use by another process" in done.stderr
    assert command("prune", f"run={run}", "keep=1").returncode == 0
    assert steps(run) == [2, 12]


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["erase"], "erase must be one of list, verify, prune, average"),
        (["list"], "run is missing"),
        (["list", "run=/nowhere"], "run=/nowhere has no checkpoint"),
        (["verify", "run=RUN", "step=3"], "step=3 has no checkpoint; there are 2, 4, 6, 8, 10, 12"),
        (["verify", "run=RUN", "step=x"], "step=x must be a number"),
        (["prune", "run=RUN", "kep=3"], "'kep=3' must be run=, step=, steps=, weights=, out=, keep="),
        (["prune", "run=RUN", "step=4"], "step must not be given to prune"),
    ],
)
def test_invalid_command_prints_one_line(six, arguments, expected):
    done = command(*(argument.replace("RUN", str(six)) for argument in arguments))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert expected in done.stderr


def test_help_works_without_run():
    for arguments in ([], ["--help"], ["prune", "-h"]):
        done = command(*arguments)
        assert done.returncode == 0 and "keep_every" in done.stdout

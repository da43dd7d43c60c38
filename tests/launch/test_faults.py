"""Faults that end a run early, from a signal to a full disk, and the resume after each."""

import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.checkpoint import checkpoints, step_of
from pretrain.monitor.scalars import tag_of
from tests.launch.commands import SMALL, restarts, run, scalars, start

FORTY = f"nproc=2 log.every=1 checkpoint.every=4 train.steps=40 {SMALL}"


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns the rank processes of a launcher, sorted by rank: the launcher starts them in that order."""
    return sorted(psutil.Process(process.pid).children(), key=lambda child: (child.create_time(), child.pid))


def send_to_a_rank(process: subprocess.Popen, number: int, step: str) -> None:
    """Sends a signal to rank 1 when the run has logged that step."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and step in line:
            break
    ranks_of(process)[1].send_signal(number)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """Trains 40 steps on two ranks without a fault, started as users do: each rank has its own hash seed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = run(f"launch/local.py data.path={data} run.dir={folder} {FORTY}", cold=True)
    assert done.returncode == 0, done.stderr
    return folder


def losses(folder: Path) -> list[float]:
    assert [line["step"] for line in scalars(folder)] == list(range(1, 41)), "no step twice, none missing"
    return [line["loss"] for line in scalars(folder)]


def test_sigterm_saves_exits_0_and_the_run_resumes(data, tmp_path):
    """SIGINT, SIGHUP and Ctrl-Z are in test_terminal.py."""
    folder = tmp_path / "run"
    arguments = f"nproc=2 train.steps=100000 data.path={data} run.dir={folder} log.every=1 optim.schedule=wsd {SMALL}"
    process = start(f"launch/local.py {arguments}")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and " 5/" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped and saved" in rest
    step = scalars(folder)[-1]["step"]
    assert checkpoints(folder)[-1].name == f"step-{step:08d}"
    assert (restarts(folder)[-1]["class"], restarts(folder)[-1]["decision"]) == ("STOPPED", "stop")
    done = run(f"launch/local.py train.stop_after={step + 3} {arguments}")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in scalars(folder)] == list(range(1, step + 4))


def test_signal_during_start_saves(data, tmp_path):
    process = start(f"launch/local.py data.path={data} run.dir={tmp_path}/run {FORTY}", cold=True)
    while not ranks_of(process):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=90)
    assert process.returncode == 0 and "stopped and saved" in said, errors
    assert [step_of(folder) for folder in checkpoints(tmp_path / "run")] == [0]


def test_kill_9_of_a_rank_ends_the_run_and_a_rerun_resumes(data, straight, tmp_path):
    """Tries it without and with automatic restarts."""
    folder = tmp_path / "run"
    arguments = f"data.path={data} run.dir={folder} {FORTY}"
    process = start(f"launch/local.py {arguments} restart.max_failures=0")
    send_to_a_rank(process, signal.SIGKILL, "10/40")
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    error = errors.splitlines()[-1]
    assert error.startswith("error: rank 1 failed (killed by SIGKILL); the run stopped") and str(folder) in error
    assert "Traceback" not in errors
    process = start(f"launch/local.py {arguments}")
    send_to_a_rank(process, signal.SIGKILL, "20/40")
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    error = errors.splitlines()[-1]
    assert error.startswith("error: rank 1 failed (killed by SIGKILL); the run starts again"), errors
    assert losses(folder) == losses(straight)
    *killed, finished = [(end["class"], end["rank"], end["decision"]) for end in restarts(folder)]
    assert killed == [("KILLED", 1, "give up"), ("KILLED", 1, "restart")]
    assert (finished[0], finished[2]) == ("FINISHED", "done"), "whichever rank was first"
    events = EventAccumulator(str(folder)).Reload()
    *_, newest = events.Tensors("about/restarts/text_summary")
    assert newest.tensor_proto.string_val[0].decode().count("KILLED, rank 1 on ") == 2
    assert [event.step for event in events.Scalars(tag_of("loss"))] == list(range(1, 41)), "one curve, without overlap"


def test_hanging_rank_is_detected_and_the_run_resumes(data, straight, tmp_path):
    folder = tmp_path / "run"
    process = start(f"launch/local.py data.path={data} run.dir={folder} {FORTY} train.hang_timeout=8")
    send_to_a_rank(process, signal.SIGSTOP, "10/40")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Current thread" in errors, errors
    assert "/torch/distributed/" in errors or "/pretrain/vocab/collectives.py" in errors, "where the other one waits"
    assert losses(folder) == losses(straight)
    (hung, done) = restarts(folder)
    assert (hung["class"], hung["rank"], hung["decision"]) == ("HUNG", 1, "restart") and done["class"] == "FINISHED"


def test_a_run_that_diverges_is_not_started_again(data, tmp_path):
    arguments = f"nproc=2 data.path={data} run.dir={tmp_path}/run train.steps=9 checkpoint.every=1 {SMALL}"
    done = run(f"launch/local.py {arguments} optim.lr=1e20 optim.warmup_steps=0")
    assert done.returncode == 1 and "the gradient's norm is" in done.stderr and "Traceback" not in done.stderr
    *spikes, end = restarts(tmp_path / "run")
    assert [spike["decision"] for spike in spikes] == ["batch left out"] * 4 + ["the run ends"], "the guard's lines"
    assert (end["class"], end["decision"]) == ("DIVERGED", "give up") and end["step"] > end["from"]


def test_a_time_limit_stops_the_run_saved(data, tmp_path):
    """Tries the run's own limit, and the job's."""
    arguments = f"data.path={data} train.steps=100000 optim.schedule=wsd log.every=1 {SMALL}"
    limits = "train.time_limit=10s checkpoint.reserve_seconds=2"
    done = run(f"launch/local.py nproc=2 run.dir={tmp_path}/own {arguments} {limits}")
    assert done.returncode == 0 and "stopped and saved" in done.stdout, done.stderr
    assert 1 < len(scalars(tmp_path / "own")) == step_of(checkpoints(tmp_path / "own")[-1]) < 100000

    at = time.time() + 2  # before the ranks are there: they save what they start with
    environment = {"ROWSHARD_DEADLINE": str(at)}
    done = run(f"launch/local.py run.dir={tmp_path}/job {arguments}", environment=environment)
    assert done.returncode == 0 and "stopped and saved" in done.stdout, done.stderr
    assert [step_of(folder) for folder in checkpoints(tmp_path / "job")] == [0]
    done = run(f"launch/local.py run.dir={tmp_path}/job {arguments}", environment={"ROWSHARD_DEADLINE": "soon"})
    assert done.returncode == 1 and "ROWSHARD_DEADLINE=soon in the environment must be a unix time" in done.stderr


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(data, tmp_path):
    """Uses a real full file system: a small tmpfs without room for the second checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root: the full disk is not tried")
    try:
        arguments = f"nproc=2 data.path={data} run.dir={disk}/run train.steps=20 checkpoint.every=5 {SMALL}"
        done = run(f"launch/local.py {arguments} log.tensorboard=false restart.max_failures=1")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr and "the last good checkpoint is" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        (good,) = checkpoints(disk / "run")
        assert not list((disk / "run" / "checkpoints").glob(".tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        done = run(f"launch/local.py {arguments} log.tensorboard=false")
        assert done.returncode == 0 and f"resumed: {good}" in done.stdout, done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_full_disk_between_saves_loses_no_step(data, tmp_path):
    """The disk has the metrics, the curves and the launcher's log. It has room again before the next save."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root: the full disk is not tried")
    try:
        with open(disk / "log", "w") as log:
            arguments = f"nproc=1 data.path={data} run.dir={disk}/run log.every=1 train.precision=fp32 {SMALL}"
            settings = f"{arguments} train.steps=100000"
            process = start(f"launch/local.py {settings}", stdout=log, text=False)
        metrics = disk / "run" / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_bytes():
            assert process.poll() is None
        with suppress(OSError), open(disk / "fill", "wb", buffering=0) as fill:
            while True:
                fill.write(bytes(4096))
        assert process.stderr is not None
        for _ in range(2):
            assert b"No space left on device; training goes on" in process.stderr.readline()
        (disk / "fill").unlink()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and not errors, errors
        steps = [line["step"] for line in scalars(disk / "run")]
        assert steps == list(range(1, step_of(checkpoints(disk / "run")[-1]) + 1))
        events = EventAccumulator(str(disk / "run")).Reload()
        assert [event.step for event in events.Scalars(tag_of("loss"))] == steps
    finally:
        subprocess.run(["umount", "-l", disk], check=True)

"""launch/slurm.py as users type it, on a fake Slurm of small scripts; tests/slurm/ has a real one."""

import fcntl
import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from launch import job_state, slurm, training
from launch.hardware import HARDWARE
from launch.snapshot import Snapshot
from pretrain.compose import build_config, load_config
from tests.pretrain.tiny import VOCAB, write_tokens

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
CLUSTERS = sorted(path.stem for path in (ROOT / "conf" / "cluster").glob("*.yaml"))
SMALL = "model.layers=2 model.width=32 model.heads=2 model.context=32 train.global_batch=64 train.micro_batch=1"


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr."""
        assert self.code == 2 and self.err.startswith("error: ") and len(self.err.splitlines()) == 1, self
        return self.err


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def test_files_that_are_links_are_mounted_where_they_lie(tmp_path):
    """The links are those of a hub cache: snapshots/REV/config.json -> ../../blobs/…"""
    (tmp_path / "blobs").mkdir()
    (snapshot := tmp_path / "snapshots" / "rev").mkdir(parents=True)
    (tmp_path / "blobs" / "0f").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0f")
    assert training.folders_of(snapshot) == {tmp_path / "snapshots", tmp_path / "blobs"}
    assert training.folders_of(tmp_path / "blobs") == {tmp_path}


@pytest.fixture(scope="module")
def code() -> Snapshot:
    return Snapshot.take()


@pytest.fixture
def command(data, code, monkeypatch, capsys):
    """Runs the command in this process, because importing torch takes longer than the rest."""
    monkeypatch.setattr(job_state, "ASK_EVERY", 0.01)
    monkeypatch.setattr(job_state, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(Snapshot, "take", lambda: code)

    def run(arguments: str) -> Said:
        given = f"{arguments} data.path={data} vocab.size={VOCAB} {SMALL}".split()
        flags = [argument for argument in given if argument.startswith("-")]
        overrides = {argument.split("=")[0]: argument for argument in reversed(given) if argument not in flags}
        monkeypatch.setattr(sys, "argv", ["launch/slurm.py", *flags, *overrides.values()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            slurm.main()
        return Said(exit.value.code, *capsys.readouterr())

    return run


def split(printed: str) -> tuple[str, str]:
    """Splits the output of dry_run: the script, and the settings."""
    script, settings = printed.split("\n# /", 1)
    return script, settings.split("\n", 1)[1]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_script_of_each_cluster(command, code, name, tmp_path, monkeypatch):
    """Needs no Slurm, and leaves no file."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    said = command(f"+cluster={name} run.dir=/shared/runs/a dry_run=true")
    script, settings = split(said.out)
    assert said.code == 0 and said.err == ""
    plain = script.replace(sys.executable, "PYTHON").replace(code.name, "CODE")
    assert plain == (SCRIPTS / f"{name}.sh").read_text(), "where the change is meant, keep what is printed here"
    assert build_config(OmegaConf.create(settings)).run.dir == "/shared/runs/a"
    assert settings.startswith("# model: 0.") and "in 1 matrix" in settings
    assert not list(tmp_path.iterdir()) and not Path("/shared").exists()


def test_what_is_submitted_is_what_dry_run_shows(command, fake_slurm, tmp_path):
    arguments = f"+cluster=cpu cluster.nodes=2 run.dir={tmp_path}/runs/a restart.max_failures=5"
    script, settings = split(command(f"{arguments} dry_run=true").out)
    assert not (tmp_path / "runs").exists() and fake_slurm.submissions == 0
    said = command(arguments)
    run = tmp_path / "runs" / "a"
    assert said.code == 0 and said.err == "", said
    assert fake_slurm.script == script
    assert yaml.safe_load((run / "config.yaml").read_text()) == yaml.safe_load(settings)
    for line in (
        "job: 12 (2 nodes × 1 rank, at most 4:00:00)",
        f"run: {run}",
        f"log: {run}/slurm/12_0_log.out",
        f"curves: tensorboard --logdir {run.parent}",
        "state: squeue -j 12",
        "cancel: scancel 12",
    ):
        assert line in said.out.splitlines()
    known = json.loads((run / "job.json").read_text())
    code = run / "code" / known["code"]
    assert (
        known["job"] == "12" and known["log"] == f"{run}/slurm/12_0_log.out" and time.time() - known["submitted"] < 60
    )
    assert f"export PYTHONPATH={code}" in script and (code / "launch" / "job.py").exists()
    with open(run / "slurm" / "12_submitted.pkl", "rb") as file:
        call = pickle.load(file).function
    assert Path(call.config_path) == run / "config.yaml"
    assert f"-m launch.job close {run} 5 0.0 || exit 1' EXIT" in script


def test_paths_are_absolute(command, fake_slurm, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command(f"+cluster=cpu run.dir=a data.path={os.path.relpath(data, tmp_path)}")
    assert said.code == 0, said
    frozen = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert frozen["run"]["dir"] == f"{tmp_path}/a" and frozen["data"]["path"] == str(data)


def test_run_is_refused_while_its_job_has_not_ended(command, fake_slurm, tmp_path):
    arguments = f"+cluster=cpu run.dir={tmp_path}/a"
    assert command(arguments).code == 0
    fake_slurm.states("PENDING")
    assert f"run.dir={tmp_path}/a is in use by job 12" in command(arguments).error and fake_slurm.submissions == 1
    fake_slurm.states("FAILED")
    assert command(arguments).code == 0, "the same command again resumes"
    fake_slurm.forget()
    assert command(arguments).code == 0 and fake_slurm.submissions == 3


def test_setup_and_partition_are_checked_before_the_submit(command, fake_slurm, tmp_path, monkeypatch):
    fake_slurm.command("scontrol", 'echo "PartitionName=debug Default=YES MaxNodes=UNLIMITED TotalNodes=2"')
    refused = command(f"+cluster=cpu cluster.nodes=4 run.dir={tmp_path}/a")
    assert "cluster.nodes=4 must be at most 2: partition debug has no more nodes" in refused.error
    assert not list(tmp_path.iterdir()) and fake_slurm.submissions == 0
    monkeypatch.setenv("ACTIVATE", "source /env/bin/activate")
    said = command(f"+cluster=cpu cluster.nodes=2 run.dir={tmp_path}/a cluster.setup=[${{oc.env:ACTIVATE}}]")
    assert said.code == 0 and fake_slurm.submissions == 1, said
    assert "does not change the Python of the job" in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize("lock", [".launch.lock", ".ranks.lock"])
def test_a_run_in_use_is_refused(command, fake_slurm, tmp_path, lock):
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a" / lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is in use by another process" in command(f"+cluster=cpu run.dir={tmp_path}/a").error
    assert fake_slurm.submissions == 0


def test_a_refusal_of_slurms_leaves_no_run(command, fake_slurm, tmp_path):
    fake_slurm.refuse("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: no\n")
    arguments = f"+cluster=cpu cluster.partition=x run.dir={tmp_path}/a"
    assert "sbatch refuses the job: invalid partition specified: x; Batch job" in command(arguments).error
    assert not (tmp_path / "a").exists()
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    assert "sbatch refuses the job" in command(arguments).error
    assert (tmp_path / "a" / "checkpoints").exists(), "a run that was there stays"


def test_a_sweep_is_one_array(command, fake_slurm, tmp_path):
    base = tmp_path / "sweep"
    sweep = f"--multirun +cluster=cpu run.dir={base} optim.lr=1e-3,2e-3"
    script, _ = split(command(f"{sweep} dry_run=true").out)
    assert not base.exists()
    said = command(sweep)
    assert said.code == 0 and fake_slurm.submissions == 1 and fake_slurm.script == script, said
    runs = [base / f"optim.lr-{lr}" for lr in ("0.001", "0.002")]
    for index, run in enumerate(runs):
        config = load_config(run / "config.yaml")
        assert f"optim.lr-{config.optim.lr}" == run.name and config.run_dir == run
        log = f"{base}/slurm/12_{index}_0_log.out"
        assert json.loads((run / "job.json").read_text())["log"] == log and f"log: {log}" in said.out
        with open(base / "slurm" / f"12_{index}_submitted.pkl", "rb") as file:
            assert pickle.load(file).function.config_path == str(run / "config.yaml")
    assert "#SBATCH --array=0-1" in script and f"runs=({' '.join(map(str, runs))})" in script
    assert "launch.job close ${runs[$SLURM_ARRAY_TASK_ID]} 3 0.0 || exit 1' EXIT" in script
    assert "job: 12 (2 times 1 node × 1 rank, at most 4:00:00)" in said.out and f"--logdir {base}\n" in said.out
    fake_slurm.states("RUNNING")
    more = sweep.replace("1e-3,2e-3", "4e-3,1e-3")
    assert f"run.dir={runs[0]} is in use by job 12_0" in command(more).error and not (base / "optim.lr-0.004").exists()


def test_a_log_is_followed_through_a_requeue(command, fake_slurm, tmp_path, monkeypatch):
    log = tmp_path / "a" / "slurm" / "12_0_log.out"
    fake_slurm.command("sbatch", f"mkdir -p {log.parent}; echo first >> {log}; echo Submitted batch job 12")
    fake_slurm.states("PENDING", "RUNNING", "COMPLETED", "PENDING", "RUNNING", "COMPLETED", "COMPLETED")
    fake_slurm.ended("COMPLETED", "0:0")
    monkeypatch.setattr(job_state, "show", show := Shown(job_state.show, log))
    said = command(f"+cluster=cpu run.dir={tmp_path}/a tail=true")
    assert said.code == 0 and show.calls >= 6
    assert said.out.split("cancel: scancel 12\n")[1] == "first\n" + "more\n" * 3
    states = [f"job 12: {state}" for state in ("PENDING", "RUNNING", "COMPLETED")]
    assert said.err.splitlines() == states * 2


class Shown:
    """Follows the log as launch/slurm.py does, while the job writes it."""

    def __init__(self, show, log: Path) -> None:
        self.show, self.log, self.calls = show, log, 0

    def __call__(self, log: Path, seen: int) -> int:
        self.calls += 1
        if self.calls in (2, 3, 4):
            with open(self.log, "a") as file:
                file.write("more\n")
        return self.show(log, seen)


def test_tail_exits_as_the_job_did(command, fake_slurm, tmp_path):
    fake_slurm.states("FAILED")
    fake_slurm.ended("FAILED", "3:0")
    said = command(f"+cluster=cpu run.dir={tmp_path}/a tail=true")
    assert said.code == 3
    (fake_slurm.folder / "job").unlink()
    fake_slurm.forget()
    said = command(f"+cluster=cpu run.dir={tmp_path}/a tail=true")
    assert said.code == 2 and f"Slurm no longer knows job 12; its log: {tmp_path}/a/slurm/12_0_log.out" in said.err


def test_the_gpu_is_that_of_the_cluster(command):
    """bf16 and offload to the CPU are checked for the cluster's GPUs, whatever this machine has."""
    settings = "run.dir=/shared/runs/a dry_run=true train.precision=bf16"
    assert command(f"+cluster=a100x8 {settings} engine.offload=cpu").code == 0
    assert "engine.offload=cpu must be none on a CPU" in command(f"+cluster=cpu {settings} engine.offload=cpu").error


WRONG = {
    "no cluster": ("", f"+cluster=NAME is missing; there are {', '.join(CLUSTERS)}: each describes nodes"),
    "a GPU that has no line": (
        "cluster=a100x8 cluster.gpu=k80",
        "rtx-4090, because cluster.gpus_per_node=8; for another GPU add a line to launch/hardware.py; cluster=a100x8 s",
    ),
    "an unknown cluster": ("+cluster=b900x8", f"cluster=b900x8 must be one of {', '.join(CLUSTERS)}"),
    "an unknown key": ("+cluster=cpu cluster.node=2", "unknown key cluster.node; did you mean cluster.nodes?"),
    "an unknown variable's type": ("+cluster=cpu cluster.nodes=many", "cluster.nodes"),
    "a wrong number": ("+cluster=cpu cluster.nodes=0", "cluster.nodes=0 must be at least 1"),
    "a time that is none": ("+cluster=cpu cluster.time=soon", "cluster.time=soon must be a time such as 2:30:00"),
    "a GPU that is none": ("+cluster=h100x8 cluster.gpu=b900", f"must be one of {', '.join(list(HARDWARE)[:-1])}"),
    "tasks, which are for tokenising": ("+cluster=cpu cluster.tasks=4", "cluster.tasks=4 is for tokenising"),
    "a batch that the ranks cannot share": ("+cluster=h100x64 cluster.nodes=9", "× 72 ranks = 72 must divide"),
    "more than the GPU holds": (
        "+cluster=a100x8 model.width=32768 model.layers=4",
        "GiB, cluster.gpu=a100-80gb has room for 76.0; ",
    ),
    "what would fit the GPU": (
        "+cluster=a100x8 model.width=8192 model.heads=64 model.layers=48 train.micro_batch=8",
        "has room for 76.0; this fits: engine.offload=cpu (",
    ),
    "a setting of the training": ("+cluster=cpu optim.lr=-1", "optim.lr=-1.0 must be positive"),
    "a setting of the restarts": ("+cluster=cpu restart.max_failures=-1", "restart.max_failures=-1"),
    "neither true nor false": ("+cluster=cpu dry_run=perhaps", "dry_run=perhaps must be true or false"),
    "heads that do not divide": ("+cluster=cpu model.heads=3", "model.heads=3 must divide model.width=32"),
    "no data": ("+cluster=cpu data.path=", "data.path is missing"),
    "data that is not there": ("+cluster=cpu data.path=/nowhere", "data.path=/nowhere must be a folder"),
    "no run": ("+cluster=cpu run.dir=", "run.dir is missing"),
    "a run that Slurm would misread": ("+cluster=cpu run.dir=/tmp/%j", "run.dir=/tmp/%j may have letters, digits"),
    "a sweep of clusters": ("--multirun +cluster=cpu cluster.nodes=1,2", "--multirun is for settings of the training"),
    "a sweep of runs": ("--multirun +cluster=cpu run.dir=/tmp/a,/tmp/b", "run.dir cannot be swept"),
    "a sweep that is followed": ("--multirun +cluster=cpu seed=1,2 tail=true", "tail=true follows one job"),
    "a sweep of the same": ("--multirun +cluster=cpu seed=1,1", "two jobs of this sweep"),
    "a sweep with one wrong value": ("--multirun +cluster=cpu optim.lr=1e-3,-1", "optim.lr=-1.0 must be positive"),
}


@pytest.mark.parametrize("bad,message", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_setting_is_one_clear_error_before_anything_is_written(command, fake_slurm, tmp_path, bad, message):
    said = command(f"{bad} run.dir={tmp_path}/a")
    assert message in said.error
    assert not list(tmp_path.iterdir()) and fake_slurm.submissions == 0


def test_script_runs_from_any_folder(tmp_path, data):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HYDRA"))}
    arguments = f"+cluster=cpu run.dir={tmp_path}/a data.path={data} vocab.size={VOCAB} {SMALL} dry_run=true".split()
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "slurm.py", *arguments],
        cwd=tmp_path,
        env=clean | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "#SBATCH --nodes=1" in done.stdout and done.stderr == "", done
    assert not list(tmp_path.iterdir())


def test_missing_slurm_is_an_error(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert (
        "sbatch is not installed here: run this on a login node" in command(f"+cluster=cpu run.dir={tmp_path}/a").error
    )
    assert not list(tmp_path.iterdir())


def test_help_names_the_keys(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch/slurm.py", "--help"])
    with pytest.raises(SystemExit):
        slurm.main()
    shown = capsys.readouterr().out
    for word in (
        "+cluster=a100x8",
        "dry_run",
        "tail",
        "--multirun",
        "cluster: a100x8, cpu",
        "restart.delay=",
        "global_batch",
    ):
        assert word in shown

"""A wrong start is reported in one line before any work, and leaves no files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import app
from data_prep.durable import check_file, check_folder
from data_prep.errors import DataError
from launch import local as launcher
from launch.local import farewell
from pretrain import train
from pretrain.checks import check_job, check_logs
from pretrain.commands import lens
from pretrain.exits import Exit
from tests.in_process import in_process
from tests.pretrain.tiny import tiny_config, write_tokens

ROOT = Path(__file__).resolve().parents[2]
SMALL = "model.layers=1 model.width=32 model.heads=2 model.context=32 train.global_batch=8 train.precision=fp32"


def start(*arguments: str, timeout: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens", vocab_size=97)


def local(tokens: Path, run: Path) -> list[str]:
    return f"data.path={tokens} vocab.size=97 run.dir={run} train.steps=1 {SMALL}".split()


def nowhere(path: Path) -> None:
    path.symlink_to("/gone/away")


def unwritable(path: Path) -> None:
    path.symlink_to("/proc/self")  # not even root can make a file there


FOLDERS = {
    "a link that leads nowhere": (nowhere, "is a link to /gone/away, which does not exist"),
    "a file": (Path.touch, "must be a folder, but is a file"),
    "a folder that cannot be written in": (unwritable, "is not writable"),
}


@pytest.mark.parametrize("name", ["checkpoints", "tokenizer", "."])
@pytest.mark.parametrize(("make", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_cannot_be_written_is_found_at_the_start(tokens, tmp_path, name, make, message):
    run = tmp_path / "run"
    if name != ".":
        run.mkdir()
    make(run / name)
    config = tiny_config(tokens, run, vocab__size=97, log__tensorboard=True)
    with pytest.raises(ValueError, match=message) as caught:
        check_logs(config)
        check_job(config, 1, "cpu")
    assert str(caught.value).startswith(f"run.dir={run}: {run / name}")


@pytest.mark.parametrize("name", ["metrics.jsonl", "restarts.jsonl", "config.yaml", ".ranks.lock", ".launch.lock"])
def test_a_folder_in_the_place_of_a_file_is_found_at_the_start(tokens, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name} must be a file that can be written"):
        check_logs(tiny_config(tokens, tmp_path / "run"))


def test_a_check_of_a_place_leaves_nothing_behind(tmp_path):
    check_folder("out", tmp_path / "a" / "b")
    check_file("out", tmp_path / "c")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file must be a folder"):
        check_folder("out", tmp_path / "file" / "b")
    (tmp_path / "link").symlink_to("/gone/away")
    with pytest.raises(DataError, match="is a link into /gone, which does not exist"):
        check_file("out", tmp_path / "link")


def test_a_run_with_nowhere_to_save_is_refused_before_anything_is_written(tokens, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    nowhere(run / "checkpoints")
    done = in_process(launcher.main, *local(tokens, run))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: run.dir={run}: {run}/checkpoints is a link to /gone/away")
    assert [path.name for path in run.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("main,settings", [(lens.main, "run=x text=a"), (app.main, "corpus=stdlib")])
def test_an_out_folder_that_leads_nowhere_is_refused_before_any_work(tmp_path, main, settings):
    nowhere(tmp_path / "out")
    done = in_process(main, *settings.split(), f"out={tmp_path}/out/deeper")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: out={tmp_path}/out/deeper: {tmp_path}/out is a link to /gone/away")


def test_a_launcher_under_torchrun_is_refused_and_leaves_nothing(tokens, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = start(*torchrun, "launch/local.py", *local(tokens, tmp_path / "run"))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said and all("has started this program 2 times: start it once, without torch" in line for line in said)
    assert done.returncode and not (tmp_path / "run").exists()


def test_a_launcher_under_srun_is_refused(tmp_path):
    """It is not refused in a batch script, nor if the variables are left over."""
    stepd = tmp_path / "slurmstepd"
    stepd.symlink_to(sys.executable)
    started = [sys.executable, "-c", "from launch.alone import alone; alone()"]
    code = f"import subprocess, sys; sys.exit(subprocess.call({started!r}))"
    environment = os.environ | {"SLURM_NTASKS": "4", "RANK": "0", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}
    for tasks, ending in (("4", 2), ("1", 0), ("", 0)):
        given = environment | {"SLURM_STEP_NUM_TASKS": tasks}
        done = subprocess.run([stepd, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True, timeout=60)
        assert done.returncode == ending, done.stderr
        assert ("slurmstepd has started this program 4 times" in done.stderr) == (ending == 2)


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["nothing", "--help"])
def test_a_rank_without_a_configuration_prints_help(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        train.main()
    said = capsys.readouterr()
    assert ended.value.code == 0 and not said.err and "launch/local.py" in said.out
    assert "torchrun --nproc-per-node 2 -m pretrain.train RUN/config.yaml" in said.out


def test_an_unfinished_run_prints_how_to_resume_it(monkeypatch, tokens, tmp_path):
    monkeypatch.chdir(ROOT)
    config = tiny_config(tokens, tmp_path, train__steps=6)
    said = farewell(config, nproc=2).splitlines()
    assert said[2] == f"resume: python launch/local.py nproc=2 run.dir={tmp_path}"
    manifest = tmp_path / "checkpoints" / "step-00000006" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert not any(line.startswith("resume:") for line in farewell(config, nproc=2).splitlines())


@pytest.mark.parametrize("folder", [ROOT, ROOT / "docs"])
def test_the_printed_sample_command_runs_this_code_from_the_current_folder(monkeypatch, tokens, tmp_path, folder):
    monkeypatch.chdir(folder)
    sample = farewell(tiny_config(tokens, tmp_path)).partition("sample: ")[2]
    assert ("pretrain.generate" in sample) and (str(ROOT) in sample) == (folder != ROOT)
    given = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = f"{sample.partition('python ')[0]}{sys.executable} -c 'import pretrain; print(pretrain.__file__)'"
    done = subprocess.run(["bash", "-c", command], env=given, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(ROOT / "pretrain" / "__init__.py"), done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{run}", "is a folder: name a run's configuration, such as {run}/config.yaml"),
        ("{run}/none.yaml", "is missing: is {run} a run?"),
        ("train.steps=3", "must be the path of a run's config.yaml: settings go to launch/local.py"),
        ("{run}/list.yaml", "must hold a run's settings"),
        ("{run}/torn.yaml", "is not YAML"),
        ("{run}/bytes.yaml", "is not YAML"),
    ],
)
def test_wrong_configuration_path_is_one_line(tmp_path, monkeypatch, capsys, given, message):
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    (tmp_path / "torn.yaml").write_text("a: [1,\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00a: \x80\n")
    monkeypatch.setattr(sys, "argv", ["train", given.format(run=tmp_path)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == Exit.REFUSED and message.format(run=tmp_path) in line

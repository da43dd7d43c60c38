"""launch/local.py --multirun: the runs of a sweep one after the other, with real ranks."""

import fcntl
import re
import signal
from pathlib import Path

import pytest

from launch import local
from pretrain.checkpoint import checkpoints, parameters, read_manifest
from pretrain.commands import sweep_report
from pretrain.compose import load_config
from tests.in_process import in_process
from tests.launch.commands import SMALL, refused, run, scalars, start
from tests.pretrain.tiny import VOCAB, write_tokens

RATES = "optim.lr=1e30,1e-2"  # the first diverges


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def sweep(tokens: Path, base: Path, settings: str, steps: int = 4) -> str:
    common = f"vocab.size={VOCAB} train.steps={steps} train.precision=fp32 log.every=1 log.tensorboard=false {SMALL}"
    return f"launch/local.py --multirun data.path={tokens} run.dir={base} {common} {settings}"


@pytest.fixture(scope="module")
def swept(tokens, tmp_path_factory) -> tuple[Path, str, str]:
    """A sweep with a run that fails: its folder, stdout and stderr."""
    base = tmp_path_factory.mktemp("sweep") / "lr"
    done = run(sweep(tokens, base, RATES))
    assert done.returncode == 1, done.stderr
    return base, done.stdout, done.stderr


def table(said: str) -> dict[str, str]:
    """The rows of the summary by the name of the run, with single spaces."""
    lines = said.rpartition("\n\n")[2].splitlines()
    assert lines[0].split() == ["run", "state", "steps", "loss", "val", "loss"]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:-3]}


def test_failed_run_is_told_and_the_others_go_on(swept):
    base, said, errors = swept
    bad, good = base / "optim.lr-1e-30", base / "optim.lr-0.01"
    assert [line for line in said.splitlines() if line.startswith("run ")][:2] == [
        f"run 1 of 2: {bad}",
        f"run 2 of 2: {good}",
    ]
    assert f"the run stopped, the same steps would diverge again: {bad}" in errors
    assert [line["step"] for line in scalars(good)] == [1, 2, 3, 4]
    rows = table(said)
    assert rows[good.name] == f"finished 4 of 4 {scalars(good)[-1]['loss']:.4f} –"
    assert re.match(r"failed \(exit code 3, DIVERGED\) 0 of 4 ", rows[bad.name])
    assert said.splitlines()[-2:] == [f"report: python -m pretrain.sweep_report runs={base}", f"runs: {base}"]


def test_report_reads_a_real_sweep(swept, tmp_path):
    base, _, _ = swept
    done = in_process(sweep_report.main, f"runs={base}", f"out={tmp_path}/sweep.html")
    assert done.returncode == 0, done.stderr
    good = next(line for line in done.stdout.splitlines() if line.endswith("  optim.lr-0.01"))
    manifest = read_manifest(checkpoints(base / "optim.lr-0.01")[-1])
    count, _ = parameters(manifest)
    assert count == 2 * 12 * 32**2 + 2 * 13 * 32 + 2 * 32 + 32 * 32 + VOCAB * 32  # blocks, norm, positions, matrix
    assert f" {count / 1e3:.3g}k " in good and " finished " in good
    assert "No run has a validation loss" in done.stdout


def test_rerun_repeats_no_finished_run(swept, tokens):
    """It tries the failed run again, and adds the new one."""
    base, _, _ = swept
    before = (base / "optim.lr-0.01" / "metrics.jsonl").read_bytes()
    done = run(sweep(tokens, base, "optim.lr=1e-2,2e-2"))
    assert done.returncode == 0, done.stderr
    assert f"{base}/optim.lr-0.01 is finished (4 of 4 steps)" in done.stdout
    assert (base / "optim.lr-0.01" / "metrics.jsonl").read_bytes() == before
    assert {name: row.split()[0] for name, row in table(done.stdout).items()} == {
        "optim.lr-0.01": "finished",
        "optim.lr-0.02": "finished",
    }


def test_stop_saves_starts_no_further_run_and_a_rerun_continues(tokens, tmp_path):
    base = tmp_path / "sweep"
    process = start(sweep(tokens, base, "seed=1,2 optim.schedule=wsd", steps=100_000))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and " 3/" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = scalars(base / "seed-1")[-1]["step"]
    assert table(rest)["seed-1"].startswith(f"stopped {step} of 100000 ")
    assert table(rest)["seed-2"] == "not started 0 of 100000 – –" and not (base / "seed-2").exists()
    done = run(sweep(tokens, base, f"seed=1,2 optim.schedule=wsd train.stop_after={step + 1}", steps=10_000))
    assert done.returncode == 0, done.stderr
    warmups = [load_config(base / f"seed-{seed}" / "config.yaml").optim.warmup_steps for seed in (1, 2)]
    assert warmups == [2000, 1000], "a run with a checkpoint keeps what followed from its length"
    assert "run 2 of 2" in done.stdout and f"{checkpoints(base / 'seed-1')[0]}, step {step}" in done.stdout
    for seed in (1, 2):
        assert [line["step"] for line in scalars(base / f"seed-{seed}")] == list(range(1, step + 2))


def test_frozen_sweep_has_the_folders_of_slurms(tokens, tmp_path):
    settings = "nproc=2 freeze=true optim.lr=1e-3,2e-3"
    arguments = sweep(tokens, tmp_path / "s", settings).split()[1:]
    done = in_process(local.main, *arguments)
    assert done.returncode == 0, done.stderr
    for rate in (0.001, 0.002):
        assert load_config(tmp_path / "s" / f"optim.lr-{rate}" / "config.yaml").optim.lr == rate
    assert done.stdout.count("frozen: ") == 2 and done.stdout.splitlines()[-1] == f"runs: {tmp_path}/s"


BAD = {
    "one wrong value": ("optim.lr=1e-3,-1", "optim.lr=-1.0 must be positive"),
    "folders": ("run.dir={base},b", "run.dir cannot be swept"),
    "the same twice": ("seed=1,1", "two jobs of this sweep would share run.dir: give each"),
    "numbers of ranks": ("nproc=1,2", "--multirun is for settings of the training: a sweep has one nproc"),
    "resumed": ("seed=1,2 resume={held}", "resume is for one run"),
    "of a held run": ("run.dir={held} seed=1,2", "held/seed-2 is in use by another process"),
    "held": ("run.dir={held}/seed-2 seed=1,2", "held/seed-2 is in use by another process"),
}


@pytest.mark.parametrize("bad,message", BAD.values(), ids=BAD.keys())
def test_wrong_sweep_is_one_error_and_starts_nothing(tokens, tmp_path, bad, message):
    base, held = tmp_path / "base", tmp_path / "held"
    (held / "seed-2").mkdir(parents=True)
    if "resume=" in bad:
        known = f"freeze=true nproc=1 vocab.size={VOCAB} data.path={tokens} run.dir={held}"
        assert in_process(local.main, *known.split()).returncode == 0
    with open(held / "seed-2" / ".launch.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = sweep(tokens, base, bad.format(base=base, held=held)).split()[1:]
        given = {word.partition("=")[0]: word for word in arguments}  # the last of a key counts
        assert message in refused(" ".join(given.values()))
    assert not base.exists() and not (held / "seed-1").exists()

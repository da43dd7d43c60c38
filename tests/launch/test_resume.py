"""Resumes of a run: with its own settings, with other ones, and of a finished run."""

import json
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from data_prep.command import compose_settings
from launch import local, resume
from launch.restart import History, RestartConfig, cause, changes_at_start, decide
from launch.supervisor import Record
from pretrain.changes import keep_older, settings_changed, table
from pretrain.compose import build_config, load_config, register_groups, write_config
from pretrain.exits import Exit
from tests.in_process import in_process
from tests.launch.commands import run
from tests.pretrain.tiny import write_tokens

SMALL = "model.layers=1 model.width=16 model.heads=2 model.context=16 train.global_batch=4 train.micro_batch=2"
SMALL += " train.precision=fp32 log.every=1 eval.every=0 vocab.size=307"


@pytest.fixture
def frozen(tmp_path) -> Path:
    """Freezes a run with another family and engine than the defaults, as a launcher does."""
    register_groups()
    ConfigStore.instance().store(group="restart", name="default", node=RestartConfig)
    tokens, folder = write_tokens(tmp_path / "tokens"), tmp_path / "run"
    typed = [f"data.path={tokens}", f"run.dir={folder}", "model=llama_tiny", "engine=deepspeed", "engine.zero_stage=2"]
    config = build_config(_train(typed))
    write_config(config, None)
    return folder


def _train(typed: list[str]) -> DictConfig:
    composed = compose_settings("train", typed)
    OmegaConf.set_struct(composed, False)
    return composed


def resumed(arguments: list[str]):
    """Composes as a launcher does."""
    typed = resume.in_full(arguments)
    composed = compose_settings("local", typed)
    OmegaConf.set_struct(composed, False)
    del composed["nproc"], composed["freeze"], composed["restart"]
    resume.apply(composed, typed)
    resume.keep_decided(composed)
    return build_config(composed)


@pytest.mark.parametrize("way", ["resume={}", "run.dir={}"])
def test_resume_takes_the_frozen_settings_and_the_typed_ones_on_top(frozen, way):
    old = load_config(frozen / "config.yaml")
    config = resumed([way.format(frozen), "optim.lr=5e-3", "engine.zero_stage=1", "train.stop_after=7"])
    assert config.optim.lr == 5e-3 and config.engine.zero_stage == 1 and config.train.stop_after == 7
    old.optim.lr, old.engine.zero_stage, old.train.stop_after = 5e-3, 1, 7
    assert config == old


def test_typed_batches_replace_those_of_the_run(frozen):
    for typed in ("{1M: 64, 2M: 128}", "{1M: 64, 3M: 96}"):
        config = resumed([f"resume={frozen}", f"train.batch_schedule={typed}"])
        write_config(config, None)
    assert config.train.batch_schedule == {"1M": 64, "3M": 96}


def test_another_engine_may_be_typed(frozen):
    config = resumed([f"resume={frozen}", "engine=fsdp2", "engine.hsdp=true"])
    assert config.engine.name == "fsdp2" and config.engine.hsdp
    assert config.model == load_config(frozen / "config.yaml").model


def test_run_frozen_before_optim_was_a_group_keeps_its_settings(frozen):
    old = OmegaConf.load(frozen / "config.yaml")
    old.optim = {"lr": 5e-3, "beta1": 0.8}
    OmegaConf.save(old, frozen / "config.yaml")
    optim = resumed([f"resume={frozen}", "optim=adamw", "optim.vocab.lr=1e-3"]).optim
    assert (optim.lr, optim.beta1, optim.vocab.lr, optim.body.lr) == (5e-3, 0.8, 1e-3, None)


def test_the_full_command_takes_no_frozen_settings(frozen, tmp_path):
    typed = [f"run.dir={frozen}", f"data.path={tmp_path}/tokens"]
    assert resume.in_full(typed) == typed


def test_longer_run_keeps_the_values_that_followed_from_its_length(frozen, tmp_path):
    """Only once there is a checkpoint; before it, and for what is typed, the new length decides."""
    old = load_config(frozen / "config.yaml")
    assert (old.optim.lr, old.optim.warmup_steps, old.train.global_batch) == (2e-3, 100, 32)
    longer = [f"run.dir={frozen}", f"data.path={tmp_path}/tokens", "train.steps=100_000", "model=gpt2"]
    new = resumed(longer)
    assert (new.optim.lr, new.optim.warmup_steps, new.train.global_batch) == (2e-3, 2000, 1024)
    checkpoint = frozen / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    kept = resumed([*longer, "optim.warmup_steps=7"])
    assert (kept.optim.lr, kept.optim.warmup_steps, kept.train.global_batch, kept.train.steps) == (2e-3, 7, 32, 100_000)


def test_resume_of_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"resume={tmp_path} must be the folder of a run"):
        resume.in_full([f"resume={tmp_path}"])


def test_resume_and_another_folder_are_refused(frozen, tmp_path):
    with pytest.raises(ValueError, match="a run cannot be resumed in another folder"):
        resumed([f"resume={frozen}", f"run.dir={tmp_path}/other"])


def test_older_settings_are_kept(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("a", "a", "b", "c"):
        keep_older(path, text)
        path.write_text(text)
    kept = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert kept == {"config.yaml": "c", "config-0001.yaml": "a", "config-0002.yaml": "b"}


def test_changes_are_those_since_the_checkpoint(frozen, tmp_path):
    was = OmegaConf.to_container(OmegaConf.load(frozen / "config.yaml"))
    was["data"]["path"] = str(Path(was["data"]["path"]).parent / "." / "tokens")
    was["optim"]["lr"], was["engine"] = 1.0, {"name": "fsdp2", "hsdp": False}
    was["run"]["dir"] = "elsewhere"
    checkpoint = frozen / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"config": was}))
    changes = [
        {"key": "engine.name", "was": "fsdp2", "is": "deepspeed"},
        {"key": "optim.lr", "was": 1.0, "is": 2e-3},
    ]
    assert settings_changed(frozen, checkpoint) == changes_at_start(frozen) == changes
    assert table(changes) == [
        "setting      was    is",
        "engine.name  fsdp2  deepspeed",
        "optim.lr     1.0    0.002",
    ]
    record = cause([Record(0, Exit.FINISHED, 0)])
    history = History(frozen)
    history.write("a", 0, 2, record, *decide(Exit.FINISHED, True, 0, RestartConfig()), changes)
    assert history.lines()[-1]["changes"] == changes
    (checkpoint / "manifest.json").write_text(json.dumps({"config": was, "weights_only": True}))
    assert changes_at_start(frozen) == []


def test_decay_starts_from_a_stable_run_and_resumes(tmp_path):
    """A new run with the settings of the stable one; its end follows from the checkpoint."""
    data, stable, folder = write_tokens(tmp_path / "tokens"), tmp_path / "stable", tmp_path / "decayed"
    wsd = "optim.schedule=wsd optim.warmup_steps=1 train.batch_schedule={128:8} train.steps=40 optim.lr=3e-3"
    begin = f"data.path={data} run.dir={stable} {SMALL} {wsd} checkpoint.every=2 train.stop_after=4"
    done = run(f"launch/local.py nproc=1 {begin}")
    assert done.returncode == 0, done.stderr
    assert "40 steps = 4,992 tokens, in batches of 4, 8 from step 3 on × 16; wsd: warm-up 1 steps" in done.stdout
    command = f"nproc=1 decay_from={stable}/2 run.dir={folder} optim.decay_steps=3"
    done = run(f"launch/local.py {command} train.stop_after=3")
    assert done.returncode == 0, done.stderr
    assert f"new run: {folder}, decays from {stable}/checkpoints/step-00000002, step 2" in done.stdout
    done = run(f"launch/local.py {command} train.stop_after=null")
    assert done.returncode == 0, done.stderr
    assert f"resumed: {folder}/checkpoints/step-00000003, step 3" in done.stdout
    config = load_config(folder / "config.yaml")
    assert (config.train.steps, config.optim.decay_steps, config.optim.lr) == (5, 3, 3e-3)
    newest = resumed([f"decay_from={stable}", f"run.dir={tmp_path}/new", "optim.decay_steps=24 samples"])
    assert newest.decay_from == f"{stable}/checkpoints/step-00000004" and newest.train.steps == 7


@pytest.mark.parametrize(
    "typed,message",
    [
        ("run.dir={run}", "run.dir must be a new folder with decay_from={run}: that run stays as it is"),
        ("run.dir={run}x train.steps=9", "train.steps must be left out with decay_from"),
        ("run.dir={run}x +recipe=gpt2_124m", "recipe=gpt2_124m must be left out with decay_from={run}"),
        ("run.dir={run}x", "decay_from={run}: run={run} has no checkpoint"),
    ],
)
def test_wrong_decay_is_refused(frozen, typed, message):
    done = in_process(local.main, f"decay_from={frozen}", *typed.format(run=frozen).split())
    assert done.returncode == 2 and message.format(run=frozen) in done.stderr, done.stderr


def test_resume_prints_changes_and_a_finished_run_is_not_started(tmp_path):
    folder = tmp_path / "run"
    begin = f"data.path={write_tokens(tmp_path / 'tokens')} run.dir={folder} train.steps=6 {SMALL}"
    done = run(f"launch/local.py nproc=1 {begin} train.stop_after=2")
    assert done.returncode == 0, done.stderr
    done = in_process(local.main, "nproc=1", f"run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert f"{folder} has reached train.stop_after=2 (step 2 of 6); train.stop_after=null continues it" in done.stdout
    done = run(f"launch/local.py nproc=1 resume={folder} train.stop_after=null optim.lr=5e-3 train.global_batch=8")
    assert done.returncode == 0, done.stderr
    rows = ["setting", "optim.lr", "train.global_batch", "train.stop_after"]
    said = done.stdout.split("settings changed since step 2:\n")[1].splitlines()
    assert [line.split()[0] for line in said[:4]] == rows and said[2].split()[1:] == ["4", "8"]
    changes = [{"key": "optim.lr", "was": 2e-3, "is": 5e-3}, {"key": "train.global_batch", "was": 4, "is": 8}]
    changes.append({"key": "train.stop_after", "was": 2, "is": None})
    lines = [json.loads(line) for line in (folder / "restarts.jsonl").read_text().splitlines()]
    assert [line.get("changes") for line in lines] == [None, changes]
    board = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    assert b"settings changed" in board and b"| train.global_batch | 4 | 8 |" in board
    old = load_config(folder / "config-0001.yaml")
    assert (old.optim.lr, old.train.global_batch, old.train.stop_after) == (2e-3, 4, 2)
    for again in (f"resume={folder}", f"resume={folder} train.steps=5"):
        done = in_process(local.main, "nproc=1", *again.split())
        assert done.returncode == 0, done.stderr
        assert f"{folder} is finished (6 of" in done.stdout and "a larger train.steps continues it" in done.stdout
        assert len((folder / "restarts.jsonl").read_text().splitlines()) == 2, "no rank was started"
    assert not (folder / "config-0002.yaml").exists()

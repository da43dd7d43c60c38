"""Trainings whose batches grow, and decays from a checkpoint of a stable run: the same bits as told beforehand."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.announce import length
from pretrain.checkpoint import checkpoints, read_manifest, step_of
from pretrain.checks import check_job
from pretrain.config.job import JobConfig
from tests.pretrain.dense import dense_training
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

MUON = {"optim__name": "muon", "optim__momentum_start": 0.85, "optim__momentum_warmup_steps": 7}
ENGINES = [
    MUON | {"engine__name": "fsdp2", "optim__weight_decay_schedule": "lr"},
    {"engine__name": "deepspeed", "engine__zero_stage": 1},
]
RAMP = {"train__steps": 12, "train__batch_schedule": {0: 6, "24 samples": 12, "768": 18}, "eval__every": 0}
WSD = {"optim__schedule": "wsd", "optim__warmup_steps": 2, "eval__every": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def scalars(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def equal_runs(one: Path, other: Path) -> None:
    """Checks that the newest checkpoints have the same tensors, moments included, and positions."""
    a, b = saved_tensors(one), saved_tensors(other)
    assert a.keys() == b.keys() and any(name.startswith("optim.exp_avg_sq.") for name in a)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), f"{name} differs"
    mine, theirs = (read_manifest(checkpoints(run)[-1]) for run in (one, other))
    assert all(mine[key] == theirs[key] for key in ("step", "tokens", "samples"))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_growing_batches_match_dense(data, tmp_path, schedule):
    settings = RAMP | {"optim__schedule": schedule, "optim__decay_steps": 4}
    truth = dense_training(tiny_config(data, tmp_path / "dense", **settings)).losses
    for world, vocab_parallel in ((1, 1), (2, 2), (3, 1)):
        config = tiny_config(
            data,
            tmp_path / f"{world}",
            train__micro_batch=2 if world == 3 else 3,
            vocab__parallel=vocab_parallel,
            **settings,
        )
        run_ranks(world, train_rank, config)
        lines = scalars(config.run_dir)
        assert [line["loss"] for line in lines] == pytest.approx(truth, rel=1e-5)
        (samples,) = read_manifest(checkpoints(config.run_dir)[-1])["samples"].values()
        assert samples == 4 * 6 + 2 * 12 + 6 * 18
        assert lines[-1]["lr"] == pytest.approx(1e-3), "the schedule ends at its floor"


@pytest.mark.parametrize("engine", ENGINES, ids=["fsdp2", "deepspeed"])
def test_resume_inside_each_size_keeps_every_bit(data, tmp_path, engine):
    def config(name: str, **changes: object) -> JobConfig:
        return tiny_config(data, tmp_path / name, **RAMP | WSD | {"optim__decay_steps": 4} | engine | changes)

    run_ranks(2, train_rank, config("straight"))
    for stop in (2, 5, 10):  # in sixes, in twelves, in the decay
        run_ranks(2, train_rank, config("parts", train__stop_after=stop))
    run_ranks(2, train_rank, config("parts"))
    equal_runs(tmp_path / "parts", tmp_path / "straight")


def test_changed_batches_of_the_past_are_refused(data, tmp_path):
    run_ranks(1, train_rank, tiny_config(data, tmp_path / "run", train__stop_after=6, **RAMP))
    later = RAMP | {"train__batch_schedule": {0: 6, "24 samples": 12, "768": 24}}
    check_job(tiny_config(data, tmp_path / "run", **later), 1, "cpu")  # from sample 48 on, where step 6 ends
    earlier = RAMP | {"train__batch_schedule": {0: 6, "36 samples": 12}}
    with pytest.raises(
        ValueError, match=r"holds a run with batches of 6 from sample 0 12 from sample 24.*below sample 48"
    ):
        check_job(tiny_config(data, tmp_path / "run", **earlier), 1, "cpu")


@pytest.fixture(scope="module", params=ENGINES, ids=["fsdp2", "deepspeed"])
def stable(request, data, tmp_path_factory) -> tuple[Path, dict]:
    """A run that has checkpoints at steps 4 and 8 of 40, and its settings."""
    folder = tmp_path_factory.mktemp("stable") / "run"
    settings = WSD | {"train__batch_schedule": {"96 samples": 18}} | request.param
    own = {"train__steps": 40, "train__stop_after": 8, "checkpoint__every": 4}
    run_ranks(2, train_rank, tiny_config(data, folder, **settings | own))
    return folder, settings


@pytest.mark.parametrize("step,decay", [(4, 5), (8, "64 samples")])
def test_decay_from_a_checkpoint_equals_the_run_told_beforehand(data, stable, tmp_path, step, decay):
    run, settings = stable
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    begin = run / "checkpoints" / f"step-{step:08d}"
    later = {"decay_from": str(begin), "optim__decay_steps": decay}
    config = tiny_config(data, tmp_path / "decayed", **settings | later)
    steps = {4: 9, 8: 12}[step]  # 64 samples are 4 steps of 18
    assert (config.train.steps, config.optim.decay_steps) == (steps, steps - step)
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "decayed", train__stop_after=step + 2, **settings | later))
    run_ranks(2, train_rank, config)  # resumes inside the decay
    told = {"train__steps": steps, "optim__decay_steps": steps - step}
    run_ranks(2, train_rank, tiny_config(data, tmp_path / "told", **settings | told))
    equal_runs(tmp_path / "decayed", tmp_path / "told")
    lines, expected = scalars(tmp_path / "decayed"), scalars(tmp_path / "told")[step:]
    for key in ("step", "loss", "lr", "tokens"):
        assert [line[key] for line in lines] == [line[key] for line in expected]
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, "the stable run must not change"
    other = str(run / "checkpoints" / f"step-{12 - step:08d}")
    with pytest.raises(ValueError, match=r"holds a run with decay_from=.*, this command has .*step-0000000[48]:"):
        check_job(tiny_config(data, tmp_path / "decayed", **settings | later | {"decay_from": other}), 2, "cpu")


def decay_of(run: Path, data: Path, folder: Path, step: int, **changes: object) -> JobConfig:
    address = str(run / "checkpoints" / f"step-{step:08d}")
    return tiny_config(data, folder, decay_from=address, **WSD | {"optim__decay_steps": 5} | changes)


def test_decay_of_an_unstable_checkpoint_is_refused(data, tmp_path):
    run_ranks(1, train_rank, tiny_config(data, tmp_path / "wsd", train__steps=6, checkpoint__every=1, **WSD))
    run_ranks(1, train_rank, tiny_config(data, tmp_path / "cosine", train__steps=2))
    unstable = {
        1: r"warmup_steps=2 and optim\.decay_steps=5 must not overlap",
        6: "stable phase .* has steps 2 to 5: name",
    }
    for step, message in unstable.items():
        with pytest.raises(ValueError, match=message):
            check_job(decay_of(tmp_path / "wsd", data, tmp_path / "new", step), 1, "cpu")
    with pytest.raises(ValueError, match=r"which has none with optim.schedule=cosine"):
        check_job(decay_of(tmp_path / "cosine", data, tmp_path / "new", 2), 1, "cpu")
    with pytest.raises(ValueError, match=r"decay_from=.* cannot be read: .*is missing"):
        check_job(decay_of(tmp_path / "wsd", data, tmp_path / "new", 77), 1, "cpu")
    with pytest.raises(
        ValueError, match=r"decay_from=.* holds a run with seed=7, this command has 8: choose another d"
    ):
        check_job(decay_of(tmp_path / "wsd", data, tmp_path / "new", 4, seed=8), 1, "cpu")
    for changes in ({"optim__schedule": "cosine"}, {"optim__decay_steps": None}):
        with pytest.raises(ValueError, match=r"must have optim.schedule=wsd and the length of the decay"):
            decay_of(tmp_path / "wsd", data, tmp_path / "new", 4, **changes)
    assert step_of(checkpoints(tmp_path / "wsd")[-1]) == 6 and not (tmp_path / "new").exists()


def test_start_says_steps_and_tokens(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", **RAMP | WSD | {"train__steps": "3k tokens", "optim__decay_steps": 4})
    assert length(config) == (
        "14 steps = 3,072 tokens, in batches of 6, 12 from step 5 on, 18 from step 7 on × 16; wsd: warm-up 2 steps,"
        " decay over the last 4"
    )

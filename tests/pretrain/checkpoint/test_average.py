"""The average of checkpoints is exact in float64, of any engine and world, and is a run that other commands read."""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import checkpoints, read_manifest, step_of
from pretrain.checkpoint.rows import CheckpointRows
from pretrain.commands import checkpoint as program
from pretrain.commands import hf
from pretrain.commands.average import settings_of_average
from pretrain.compose import freeze, load_config
from pretrain.config.generation import GenerateConfig
from pretrain.data import open_data
from pretrain.generation import generate
from tests.in_process import in_process
from tests.pretrain.checkpoint.test_manager import edit_manifest, flip
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank
from tests.ranks import in_fork, run_ranks

command = partial(in_process, program.main)
SPLIT = 3
LINKS = [(2, 2, {"name": "fsdp2"}, 3), (4, 3, {"name": "deepspeed", "zero_stage": 3}, 2), (6, 1, {"name": "fsdp2"}, 3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of six steps by two engines on 2, 3 and 1 ranks; the matrix is split after step 3."""
    folder = tmp_path_factory.mktemp("average")
    data = make_corpus(folder / "data", val=160)
    for stop, world, engine, micro in LINKS:
        changes = {"engine": engine, "train__micro_batch": micro, "train__stop_after": stop, "checkpoint__every": 1}
        changes |= {"vocab__size": None, "vocab__untie_at": SPLIT, "train__steps": 6, "ema__decay": 0.9}
        config = tiny_config(data, folder / "run", **changes)
        freeze(config, open_data(config.data))
        run_ranks(world, train_rank, config)
    return config.run_dir


def weights_at(run: Path, step: int) -> dict[str, Tensor]:
    checkpoint = CheckpointRows(next(folder for folder in checkpoints(run) if step_of(folder) == step))
    names = [name for name in checkpoint.shapes if not name.startswith(("optim.", "ema."))]
    return {name: checkpoint.rows(name, 0, checkpoint.shapes[name][0]) for name in names}


def dense_average(run: Path, steps: list[int], factors: list[float]) -> dict[str, Tensor]:
    """Float64 average of whole tensors; a matrix that is not yet split counts for both uses."""
    found = [weights_at(run, step) for step in steps]
    names = {name for weights in found for name in weights}
    truth = {}
    for name in names:
        total = sum(f * w.get(name, w["embedding.weight"]).double() for f, w in zip(factors, found, strict=True))
        truth[name] = (total / sum(factors)).float()
    return truth


@pytest.mark.parametrize(
    "steps,weights,chosen,factors",
    [
        ("1..3", None, [1, 2, 3], [1, 1, 1]),
        ("4..6", "linear", [4, 5, 6], [1, 2, 3]),
        ("[2,5,6]", "[0.25,0,1.75]", [2, 5, 6], [0.25, 0, 1.75]),
        ("2..99", "uniform", [2, 3, 4, 5, 6], [1] * 5),
    ],
)
def test_average_is_the_float64_one(run, tmp_path, steps, weights, chosen, factors):
    out = tmp_path / "new" / "average"
    words = ["average", f"run={run}", f"steps={steps}", f"out={out}", *([f"weights={weights}"] if weights else [])]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    between = f"average of {len(chosen)} checkpoints, steps {chosen[0]} to {chosen[-1]}"
    assert done.stdout.splitlines()[-1].startswith(f"{out}/checkpoints/step-00000000: {between}, ")
    truth, found = dense_average(run, chosen, factors), saved_tensors(out)
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(found[name], tensor), name
    config, manifest = load_config(out / "config.yaml"), read_manifest(checkpoints(out)[0])
    assert config.vocab.tie == ("untied" if chosen[-1] > SPLIT else "tied") and config.vocab.untie_at is None
    assert config.run.dir == str(out) and manifest["average"]["steps"] == chosen
    assert manifest["average"]["weights"] == [factor / sum(factors) for factor in factors]
    assert command("verify", f"run={out}").returncode == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["average"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = command(*words)
    assert again.returncode == 2 and again.stderr.startswith(f"error: out={out} exists; choose another out=")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.fixture(scope="module")
def average(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "average"
    assert command("average", f"run={run}", "steps=2..6", f"out={out}").returncode == 0
    return out


def test_generate_and_export_read_it(average, tmp_path):
    settings = GenerateConfig(run=str(average), prompt="the", tokens=10)
    assert "".join(generate(settings, torch.device("cpu"))).startswith("the")
    done = in_process(hf.main, "export", f"run={average}", f"out={tmp_path / 'hf'}")
    assert done.returncode == 0 and (tmp_path / "hf" / "tokenizer.json").is_file(), done.stderr


@pytest.mark.parametrize("world,engine", [(1, "fsdp2"), (2, "deepspeed")])
def test_training_continues_from_it(average, tmp_path, world, engine):
    """Uses its settings. A rate of almost 0 leaves the weights as they are."""
    run = Path(shutil.copytree(average, tmp_path / "run"))
    frozen = load_config(average / "config.yaml")
    changes = {"vocab__size": None, "vocab__tie": "untied", "engine": {"name": engine}, "optim__lr": 1e-30}
    config = tiny_config(Path(frozen.data.path), run, train__steps=2, ema__decay=0.9, **changes)
    run_ranks(world, train_rank, config)
    found, kept = saved_tensors(run), saved_tensors(average)
    for name, tensor in kept.items():
        assert torch.equal(found[name], tensor), name
        np.testing.assert_allclose(found[f"ema.{name}"], tensor, rtol=1e-6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[-1]["val_loss"] > 0


KILL = """
import os, signal, sys
from pretrain.checkpoint import rows, tensor_file
from pretrain.commands import average, checkpoint

write, publish, copytree = rows.write_streamed, rows.publish, average.shutil.copytree
stages = {
    "tensors": lambda: setattr(rows.CheckpointRows, "rows", stop),
    "manifest": lambda: setattr(rows, "publish", stop),
    "settings": lambda: setattr(average.shutil, "copytree", stop),
    "folder": lambda: setattr(os, "rename", stop),
}

def stop(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

stages[sys.argv.pop(1)]()
checkpoint.main()
"""


@pytest.mark.parametrize("stage", ["tensors", "manifest", "settings", "folder"])
def test_kill_leaves_nothing_that_looks_finished(run, tmp_path, stage):
    out = tmp_path / "average"
    code = in_fork(killed, stage, [f"run={run}", "steps=4..6", f"out={out}"])
    assert code == -signal.SIGKILL
    assert not out.exists() and not checkpoints(out)
    assert {path.name for path in tmp_path.iterdir()} <= {"average.unfinished", "average.unfinished.lock"}
    assert not list((tmp_path / "average.unfinished" / "checkpoints").glob("step-*"))
    done = command("average", f"run={run}", "steps=4..6", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["average"] and len(checkpoints(out)) == 1


def killed(stage: str, words: list[str]) -> int:
    """Exit code of the command in a process that kills itself at this stage."""
    pid = os.fork()
    if pid == 0:
        sys.argv = ["command", stage, "average", *words]
        exec(KILL, {})
        os._exit(0)
    return -os.waitpid(pid, 0)[1]


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["steps=1..3"], "out is missing"),
        (["out=OUT"], "steps is missing"),
        (["steps=1-3", "out=OUT"], "steps=1-3 must be a range such as 800..1000, or a list such as [600,800,1000]"),
        (["steps=[1,7]", "out=OUT"], "steps=[1,7]: step 7 has no checkpoint; there are 1, 2, 3, 4, 5, 6"),
        (["steps=6..9", "out=OUT"], "steps=6..9 must choose at least two checkpoints; there are 1, 2, 3, 4, 5, 6"),
        (["steps=1..3", "out=OUT", "weights=mean"], "weights=mean must be uniform, linear, or a list"),
        (["steps=1..3", "out=OUT", "weights=[1,2]"], "weights=[1,2] must have 3 numbers, one for each checkpoint"),
        (["steps=1..2", "out=OUT", "weights=[0,0]"], "weights=[0,0] must be numbers of at least 0, not all 0"),
        (["steps=1..2", "out=OUT", "weights=[1,nan]"], "weights=[1,nan] must be numbers of at least 0, not all 0"),
        (["steps=1..3", "out=OUT", "keep=2"], "keep must not be given to average"),
        (["steps=1..3", "out=OUT", "step=2"], "step must not be given to average"),
    ],
)
def test_invalid_command_prints_one_line(run, tmp_path, arguments, expected):
    out = tmp_path / "out"
    done = command("average", f"run={run}", *(word.replace("OUT", str(out)) for word in arguments))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and expected in done.stderr, done.stderr
    assert not any(tmp_path.iterdir())


def test_average_of_a_decay_has_its_own_schedule(tmp_path):
    optim = {"optim__schedule": "wsd", "optim__decay_steps": 3, "optim__warmup_steps": 1}
    decay = tiny_config(tmp_path, tmp_path / "run", decay_from="a/checkpoints/step-00000004", **optim)
    own = settings_of_average(decay, tmp_path / "out", untied=False)
    assert (own.decay_from, own.train.steps, decay.train.steps) == (None, 7, 7)


def test_keys_of_average_are_refused_elsewhere(run):
    done = command("prune", f"run={run}", "steps=1..2")
    assert done.returncode == 2 and "steps must not be given to prune" in done.stderr


def test_other_model_and_damage_are_refused_before_writing(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    third, fourth = checkpoints(other)[2:4]
    flip(next(fourth.glob("*.safetensors")), -1)
    words = ["average", f"run={other}", "steps=3..4", f"out={tmp_path / 'out'}"]
    done = command(*words)
    assert done.returncode == 2 and " is damaged" in done.stderr
    shapes = read_manifest(third)["tensors"]
    edit_manifest(third, tensors=shapes | {"norm.weight": [25]})
    done = command(*words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "steps= must choose checkpoints of one model: step 3 has norm.weight [25], step 4 has" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

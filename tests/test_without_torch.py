"""No command imports torch to print its help or to refuse a setting: that alone would take seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.locks import LAUNCH_LOCK, lock_run
from tests.pretrain.tiny import write_tokens

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, sys
from importlib import import_module
from tests.in_process import in_process

main = import_module(sys.argv[1]).main
for arguments in json.loads(sys.argv[2]):
    done = in_process(main, *arguments)
    print(json.dumps([done.returncode, done.stderr, "torch" in sys.modules]))
"""
TRAINING = ["run.dir={run}", "data.path={data}", "vocab.size=307"]
REFUSED_TRAINING = [
    ([*TRAINING, "train.stepz=3"], "train.stepz"),
    ([*TRAINING, "train.steps=0"], "train.steps=0 must be at least 1"),
    ([*TRAINING, "vocab.size=null"], "vocab.size=null must be given"),
    ([*TRAINING, "data.path={run}/none"], "{run}/none"),
    ([*TRAINING, "model.heads=5"], "model.heads=5 must divide"),
]
CLUSTER = ["cluster=cpu", "cluster.nodes=1", "cluster.tasks_per_node=2"]
COMMANDS = {
    "launch.local": [
        *REFUSED_TRAINING,
        ([*TRAINING, "nproc=two"], "nproc=two must be a number of ranks"),
        ([*TRAINING, "nproc=3", "train.global_batch=32"], "must divide train.global_batch=32"),
        ([*TRAINING, "nproc=2", "vocab.parallel=3"], "vocab.parallel=3 must divide the number of ranks, 2"),
        (["run.dir={held}", *TRAINING[1:]], "run.dir={held} is in use by another process"),
    ],
    "launch.slurm": [
        ([*CLUSTER, "dry_run=true", *arguments], said)
        for arguments, said in (
            *REFUSED_TRAINING,
            ([*TRAINING, "vocab.parallel=3"], "vocab.parallel=3 must divide the number of ranks, 2"),
        )
    ],
    "launch.plan": [
        ([*CLUSTER, "vocab.size=307", "train.steps=0"], "train.steps=0 must be at least 1"),
        ([*CLUSTER, "vocab.size=307", "train.global_batch=1", "train.micro_batch=1"], "must divide"),
        ([*CLUSTER, "vocab.size=307", "vocab.parallel=3"], "vocab.parallel=3 must divide the number of ranks, 2"),
        (CLUSTER, "vocab.size=null must be given"),
    ],
    "data_prep.app": [(["out={run}", "tokenizer.vocab=0"], "tokenizer.vocab"), (["out={run}", "path={run}"], "path")],
    "pretrain.generate": [
        (["run={run}"], "run={run} has no checkpoint"),
        (["run={run}", "top_p=2"], "top_p=2.0 must be in (0, 1]"),
        (["runs={run}"], "unknown key runs"),
    ],
    "pretrain.commands.lens": [
        (["run={run}", "text=a"], "run={run} has no checkpoint"),
        (["run={run}", "text=a", "norm=half"], "norm=half must be one of"),
    ],
    "pretrain.commands.checkpoint": [
        (["list", "run={run}"], "run={run} has no checkpoint"),
        (["list", "runs={run}"], "must be run=, step="),
    ],
    "pretrain.commands.hf": [
        (["export", "run={run}", "out={run}"], "run={run} has no checkpoint"),
        (["export", "run={run}", "out={run}", "dtype=fp8"], "dtype=fp8 must be one of fp32, bf16, fp16"),
        (["import", "hf={run}", "run={held}"], "run.dir={held} is in use by another process"),
    ],
    "pretrain.commands.data": [
        (["show", "run={run}"], "{run}/config.yaml is missing"),
        (["show", "data.path={run}", "world=x"], "world=x must be a number of at least 0"),
        (["show", *TRAINING[1:], "step=1", "train.steps=0"], "train.steps=0 must be at least 1"),
    ],
    "pretrain.commands.tie_report": [(["tied={run}"], "untied is missing")],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_refused_settings_import_no_torch(command, tmp_path):
    names = {"run": tmp_path / "run", "held": tmp_path / "held", "data": write_tokens(tmp_path / "tokens")}
    cases = [(["--help"], "")]
    for arguments, said in COMMANDS[command]:
        cases.append(([argument.format(**names) for argument in arguments], said.format(**names)))
    words = [sys.executable, "-c", SCRIPT, command, json.dumps([arguments for arguments, _ in cases])]
    with lock_run(names["held"], LAUNCH_LOCK):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for (arguments, said), line in zip(cases, done.stdout.splitlines(), strict=True):
        code, error, torch = json.loads(line)
        assert (code, torch) == (2 if said else 0, False) and said in error, (arguments, error)

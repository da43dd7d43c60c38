"""Tests that no command imports torch to print its help or to refuse a setting, because the import takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain.families.gpt2 import GPT2, GPT2Config
from pretrain.locks import LAUNCH_LOCK, lock_run
from tests.pretrain.tiny import tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

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
    ([*TRAINING, "profile.steps=[3,2]"], "profile.steps=[3,2] must begin at step 1 or later, and end"),
    ([*TRAINING, "model.heads=5"], "model.heads=5 must divide"),
]
NO_MODELS = {  # folders that cannot start a run, and their messages
    "none": "{none}/config.json is missing",
    "bloom": "{bloom}/config.json: model_type=bloom must be one of",
    "rows": "{rows}: its embedding has 307 rows, but config.json says vocab_size=308",
    "lacks": "{lacks} has no tensor ln_f.weight",
    "shape": "h.0.mlp.c_fc.weight has shape (23, 96), but config.json implies (24, 96)",
    "broken": "{broken}/model.safetensors cannot be read",
}
MODEL = GPT2Config(layers=1, width=24, heads=3, context=16)  # of the folder {hf}
OTHER_SETTINGS = "init_from=hf:{hf} has other settings than this run: give"
SAME = ["init_from=hf:{hf}", "model.layers=1", "model.width=24", "model.heads=3", "model.context=16"]
REFUSED_TRAINING += [
    *(([*TRAINING, f"init_from=hf:{{{name}}}"], said) for name, said in NO_MODELS.items()),
    ([*TRAINING, "model=llama_tiny", "init_from=hf:{hf}"], "model.family=llama must be gpt2"),
    ([*TRAINING, *SAME, "model.layers=2"], f"{OTHER_SETTINGS} model.layers=1"),
    ([*TRAINING, *SAME, "vocab.size=308"], f"{OTHER_SETTINGS} vocab.size=307"),
]
PARALLEL = ([*TRAINING, "vocab.parallel=3"], "vocab.parallel=3 must divide the number of ranks, 2")
CLUSTER = ["cluster=cpu", "cluster.nodes=1", "cluster.tasks_per_node=2"]
COMMANDS = {
    "launch.local": [
        *REFUSED_TRAINING,
        ([*TRAINING, "nproc=two"], "nproc=two must be a number of ranks"),
        ([*TRAINING, "nproc=3", "train.global_batch=32"], "must divide train.global_batch=32"),
        (["nproc=2", *PARALLEL[0]], PARALLEL[1]),
        (["run.dir={held}", *TRAINING[1:]], "run.dir={held} is in use by another process"),
    ],
    "launch.slurm": [
        ([*CLUSTER, "dry_run=true", *arguments], said) for arguments, said in (*REFUSED_TRAINING, PARALLEL)
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
        *(([f"hf={{{name}}}", "text=a"], said) for name, said in NO_MODELS.items()),
    ],
    "pretrain.commands.checkpoint": [
        (["list", "run={run}"], "run={run} has no checkpoint"),
        (["list", "runs={run}"], "must be run=, step="),
    ],
    "pretrain.commands.hf": [
        (["export", "run={run}", "out={run}"], "run={run} has no checkpoint"),
        (["export", "run={capped}", "out={run}"], "vocab.softcap=9.0 cannot be exported"),
        (["export", "run={trained}", "out={held}"], "out={held} exists; choose another out="),
        (["export", "run={run}", "out={run}", "dtype=fp8"], "dtype=fp8 must be one of fp32, bf16, fp16"),
        (["push", "folder={none}", "repo=me/a"], "{none}/config.json is missing"),
        (["import", "hf={run}", "run={held}"], "run.dir={held} is in use by another process"),
        *((["import", f"hf={{{name}}}", "run={run}"], said) for name, said in NO_MODELS.items()),
        (["import", "hf={hf}", "run={run}", "model.layers=1"], "model.layers must not be given"),
        (["import", "hf={hf}", "run={run}", "train.steps=0"], "train.steps=0 must be at least 1"),
        (["import", "hf={hf}", "run={queued}"], "run={queued} must be new, but has config.yaml"),
    ],
    "pretrain.commands.data": [
        (["show", "run={run}"], "{run}/config.yaml is missing"),
        (["show", "data.path={run}", "world=x"], "world=x must be a number of at least 0"),
        (["show", *TRAINING[1:], "step=1", "train.steps=0"], "train.steps=0 must be at least 1"),
    ],
    "pretrain.commands.profile": [
        (["run={none}"], "run={none} must be the folder of a run"),
        (["run={hf}"], "run={hf} has no trace: train some steps with a trace"),
    ],
    "pretrain.publish": [(["run={run}"], "run={run} must be the folder of a run: it has no metrics.jsonl")],
    "pretrain.commands.sweep_report": [
        (["out=a.html"], "runs is missing"),
        (["runs={none}"], "runs={none} must be a folder with runs in it"),
        (["runs={hf}"], "runs={hf} has no run with logged steps"),
    ],
    "pretrain.commands.coordinate_check": [
        (["data.path={run}"], "optim.lr is missing"),
        (["data.path={run}", "optim.lr=1", "widths=16"], "widths=16 must be at least two widths"),
    ],
    "pretrain.commands.tie_report": [(["tied={run}"], "untied is missing")],
}


def write_model(folder: Path, lacks: str = "", misshapen: str = "", **settings: object) -> None:
    """Writes a folder of MODEL with 307 rows in bf16, which numpy cannot read: only headers may be read."""
    folder.mkdir()
    shapes = {"wte.weight": (307, MODEL.width)}
    for mapping in GPT2.hugging_face.mappings(MODEL):
        shapes |= {name: mapping.their_shape(name) for name in mapping.theirs}
    if misshapen:
        rows, *columns = shapes[misshapen]
        shapes[misshapen] = (rows - 1, *columns)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items() if name != lacks}
    save_file(tensors, folder / "model.safetensors")
    config = GPT2.hugging_face.settings(MODEL) | {"vocab_size": 307} | settings
    (folder / "config.json").write_text(json.dumps(config))


def folders(base: Path) -> dict[str, Path]:
    """The arguments of the commands, by the names in COMMANDS."""
    names = {name: base / name for name in ("run", "held", "queued", "hf", "trained", "capped", *NO_MODELS)}
    names["queued"].mkdir()
    (names["queued"] / "config.yaml").touch()
    for name in ("hf", "broken"):
        write_model(names[name])
    (names["broken"] / "model.safetensors").write_bytes(b"no header")
    write_model(names["bloom"], model_type="bloom")
    write_model(names["rows"], vocab_size=308)
    write_model(names["lacks"], lacks="ln_f.weight")
    write_model(names["shape"], misshapen="h.0.mlp.c_fc.weight")
    names["data"] = write_tokens(base / "tokens")
    return names


def train(names: dict[str, Path]) -> None:
    for name, softcap in (("trained", None), ("capped", 9.0)):
        run_ranks(1, train_rank, tiny_config(names["data"], names[name], train__steps=1, vocab__softcap=softcap))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_refused_settings_import_no_torch(command, tmp_path):
    names = folders(tmp_path)
    if command == "pretrain.commands.hf":
        train(names)
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

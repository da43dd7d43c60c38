"""Measures how much of the gap to a decayed learning rate an average of checkpoints closes.

`python -m tests.benchmarks.averaging data=data/stdlib out=runs/wsd` trains a small model at a constant learning rate,
decays a copy of it over the last fifth of the steps, to 0, on the same samples, averages checkpoints of the constant
part, and evaluates everything. It takes 12 minutes on two cores. What is done already is not repeated.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from data_prep.arguments import key_values
from pretrain.checkpoint import checkpoint_of

STEPS, EVERY = 1200, 40
BRANCH = STEPS * 4 // 5
FIRST = (720, 960, 1040)  # steps at which the averages begin
MODEL = "model=nano model.layers=2 model.width=128 model.heads=4 model.context=128"
TRAIN = f"train.steps={STEPS} train.global_batch=16 train.micro_batch=8 optim.lr=2e-3 optim.warmup_steps=50"
STABLE = f"optim.schedule=wsd optim.decay_fraction=0 checkpoint.every={EVERY} checkpoint.keep=0"
SEEN = "eval.every=240 log.every=20 log.tensorboard=false"
DECAY = "optim.decay_fraction=0.2 optim.min_lr_ratio=0"
FROZEN = "train.steps=1 optim.lr=1e-30 optim.warmup_steps=0 checkpoint.every=0"  # one step that changes no weight


def main() -> None:
    given = key_values(sys.argv[1:], ("data", "out"), "data=, out=")
    out = Path(given["out"])
    stable, decayed = out / "stable", out / "decayed"
    python("launch/local.py", f"nproc=2 {MODEL} data.path={given['data']} run.dir={stable} {TRAIN} {STABLE} {SEEN}")
    branch(stable, decayed)
    python("launch/local.py", f"nproc=2 resume={decayed} {DECAY}")
    constant, end = measured(stable), measured(decayed)
    print(f"\nvalidation bits per byte at step {STEPS}: constant {constant:.4f}, decayed {end:.4f}")
    for first in FIRST:
        average = out / f"average-{first}"
        if not average.exists():
            python("-m", f"pretrain.checkpoint average run={stable} steps={first}..{STEPS} out={average}")
            python("launch/local.py", f"nproc=2 resume={average} {FROZEN}")
        bits = measured(average)
        closed = (constant - bits) / (constant - end)
        print(f"average of steps {first} to {STEPS}: {bits:.4f}, {closed:.0%} of the gap", flush=True)


def branch(stable: Path, decayed: Path) -> None:
    """Makes a run of the stable one as it was when the decay begins."""
    if decayed.exists():
        return
    source = checkpoint_of(stable, BRANCH)
    shutil.copytree(source, decayed / "checkpoints" / source.name)
    shutil.copytree(stable / "tokenizer", decayed / "tokenizer")
    frozen = (stable / "config.yaml").read_text()
    (decayed / "config.yaml").write_text(frozen.replace(f"dir: {stable}", f"dir: {decayed}"))


def measured(run: Path) -> float:
    """Last validation bits per byte."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line][-1])


def python(program: str, arguments: str) -> None:
    subprocess.run([sys.executable, program, *arguments.split()], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

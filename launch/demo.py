#!/usr/bin/env python
"""`make demo`: all steps on this machine, each by the command that a user would type.

Tokenises Python's standard library, trains a small model on two ranks that share one row-sharded matrix, compares it
with xz on the validation text, samples, and draws the logit lens. Finished steps are not repeated.
"""

import json
import lzma
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

import numpy as np  # noqa: E402
import torch  # noqa: E402

from data_prep.command import one_line  # noqa: E402
from data_prep.terminal import EXIT_INTERRUPTED  # noqa: E402
from data_prep.token_file import TOKENIZER_FOLDER, Manifest, TokenFile  # noqa: E402
from data_prep.tokenizer import Tokenizer  # noqa: E402
from launch.supervisor import own_code  # noqa: E402

DATA, RUN = Path("data/stdlib"), Path("runs/demo")
STEPS = 380
SETTINGS = "train.global_batch=8 train.micro_batch=4 optim=muon optim.lr=3e-3 optim.vocab.lr=1e-2"
SCHEDULE = "optim.warmup_steps=30 optim.min_lr_ratio=0.02"
CADENCE = "log.every=20 eval.every=190 checkpoint.every=100"


def main() -> None:
    """Exits with the exit code of the first step that fails."""
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # two ranks may have only two cores
    nproc = min(2, torch.cuda.device_count()) or 2
    paths = f"data.path={DATA} run.dir={RUN}"
    train = f"launch/local.py nproc={nproc} model=nano {paths} train.steps={STEPS} {SETTINGS} {SCHEDULE} {CADENCE}"

    step(
        "1. Turn Python's standard library into token files",
        f"data_prep/tokenize.py corpus=stdlib tokenizer=bpe out={DATA}",
    )
    step(f"2. Train on {nproc} ranks; each rank owns part of the vocabulary rows", train)
    print("\n3. Compare with a compressor on the same validation text\n")
    compare()
    step("4. Sample", f"-m pretrain.generate run={RUN} prompt='def read_file(path):' tokens=120 seed=1")
    step(
        "5. What would each layer guess? The logit lens",
        f"-m pretrain.lens run={RUN} example=repetition out={RUN / 'lens'}",
    )
    print(f"""
The run is in {RUN}: checkpoints, metrics.jsonl, config.yaml, TensorBoard's event files.
  lens        {RUN}/lens/lens.html
  curves      .venv/bin/tensorboard --logdir runs
  continue    .venv/bin/python {train.replace(f"train.steps={STEPS}", f"train.steps={2 * STEPS}")}
              (twice the schedule: the learning rate rises once more)
  your data   .venv/bin/python data_prep/tokenize.py corpus=files corpus.paths='[my.jsonl]' tokenizer=bpe out=data/mine
  more        README.md""")


def step(title: str, command: str) -> None:
    """Prints a command and runs it. After Ctrl-C waits until the command has saved, then stops."""
    print(f"\n{title}\n$ python {command}\n", flush=True)
    process = subprocess.Popen([sys.executable, *shlex.split(command)], env=os.environ | own_code(os.environ))
    interrupted = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        print("stopped; `make demo` continues from here")
        sys.exit(EXIT_INTERRUPTED)
    if process.returncode:
        sys.exit(process.returncode)


def compare() -> None:
    """Prints validation bits per byte of the model, and of `xz -9` on the same text."""
    tokenizer = Tokenizer.load(DATA / TOKENIZER_FOLDER)
    ids = np.concatenate([TokenFile(DATA / entry.name).tokens for entry in Manifest.load(DATA).split("val")])
    text = tokenizer.decode_bytes(ids[ids != tokenizer.end_of_document])
    scalars = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    measured = [line["val_bits_per_byte"] for line in scalars if "val_bits_per_byte" in line]
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    guess = math.log2(tokenizer.vocab_size) * len(ids) / len(text)
    print(f"   {len(text):,} bytes of validation text, never seen in training:")
    for bits, what in (
        (guess, "a blind guess"),
        (measured[0], "the model, first evaluation"),
        (measured[-1], "the model, now"),
        (xz, "xz -9"),
    ):
        print(f"   {bits:6.3f} bits per byte  {what}", flush=True)


if __name__ == "__main__":
    with one_line():
        main()

"""The commands of a user: the demo, a run that is resumed, and what a save costs the training."""

import json
import math
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from launch import demo
from pretrain.mesh import ranks
from tests import warm
from tests.benchmarks import save
from tests.benchmarks.measure import MIB
from tests.docs.small import script, small
from tests.gpu_phases.running import Figures, Part, say
from tests.pretrain.tiny import write_tokens
from tests.warm import Command

RANK_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # `ranks` sets them
ROOT = Path(__file__).resolve().parents[2]
SAVES = {
    "small": "--vocab 512 --width 64 --layers 1 --sequences 1 --length 32 --steps 2 --repeats 1",
    "full": "--vocab 131072 --width 1024 --layers 12 --sequences 4 --length 1024 --steps 20 --repeats 3",
}
RUNS = {  # the settings of the run that is resumed, and its steps
    "small": (
        "model.layers=2 model.width=32 model.heads=2 model.context=32 vocab.size=512 train.global_batch=4"
        " train.micro_batch=2",
        8,
    ),
    "full": ("model=gpt2 vocab.size=131072 train.seq_len=1024 train.global_batch=16 train.micro_batch=8", 40),
}


def parts(is_small: bool, out: Path) -> dict[str, Part]:
    size = "small" if is_small else "full"
    return {
        "make demo": partial(whole_demo, is_small),
        "resume": partial(resumed, size),
        "a save": partial(cost_of_a_save, size),
    }


def whole_demo(is_small: bool) -> Figures:
    """Runs `python launch/demo.py`, which `make demo` runs; small: its steps, on other texts and a smaller model."""
    with _folder() as folder:
        start = time.monotonic()
        where = folder if is_small else ROOT
        run = where / demo.RUN
        assert not run.exists(), f"{run} exists: a demo would not train again; remove it first"
        if is_small:
            _small_demo(where)
        else:
            _succeeds(["launch/demo.py"])
        lines = _metrics(run)
        last = [line for line in lines if "tokens_per_s" in line][-1]
        bits = [line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line]
        count = round(last["tokens_per_s"] / last["tokens_per_s_per_rank"])
        figures = {"seconds": time.monotonic() - start, "ranks": count}
        kept = ("step", "loss", "tokens_per_s", "step_s", "peak_memory_gib", "mfu", "data_wait")
        figures |= {key: last[key] for key in kept if key in last} | {"val_bits_per_byte": bits[-1]}
    gpus = torch.cuda.device_count()
    assert figures["ranks"] == (min(2, gpus) or 2), f"{figures['ranks']} ranks on {gpus} GPUs"
    return figures


def _small_demo(folder: Path) -> None:
    (folder / "texts").mkdir()
    for number in range(60):
        (folder / "texts" / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)

    def step(title: str, command: str) -> None:
        say(f"  {title}")
        _succeeds(script(small(["python", *shlex.split(command)], folder))[1:], folder, Command)

    with _warm(), patch.object(demo, "ROOT", folder), patch.object(demo, "step", step):
        demo.main()


def resumed(size: str) -> Figures:
    """Trains without a pause, then again from the checkpoint in the middle. On a GPU attention's backward has no fixed
    order, so only the first loss after the checkpoint must have the same bits.
    """
    settings, steps = RUNS[size]
    popen = Command if size == "small" else subprocess.Popen
    with _warm(), _folder() as folder:
        data = write_tokens(folder / "tokens", 512, documents=2000)
        half = steps // 2
        given = f"{settings} data.path={data} train.steps={steps} optim.warmup_steps=2 eval.every=0 log.every=1"
        words = ["launch/local.py", *given.split(), f"checkpoint.every={half}", "checkpoint.keep=0"]
        _succeeds([*words, f"run.dir={folder / 'whole'}"], popen=popen)
        shutil.copytree(folder / "whole", folder / "again", ignore=shutil.ignore_patterns(f"step-*{steps}"))
        _succeeds([*words, f"run.dir={folder / 'again'}"], popen=popen)
        whole, again = ({line["step"]: line for line in _metrics(folder / run)} for run in ("whole", "again"))
        assert whole.keys() == again.keys() == set(range(1, steps + 1)), (sorted(whole), sorted(again))
        assert whole[steps]["step_s"] != again[steps]["step_s"], "the second run did not train"
    apart = [abs(whole[step]["loss"] / again[step]["loss"] - 1) for step in range(half + 1, steps + 1)]
    assert apart[0] == 0, f"the first loss after the checkpoint differs by {apart[0]:.1e}"
    assert all(math.isfinite(difference) and difference < 1e-2 for difference in apart), apart
    rates = [line["tokens_per_s"] for line in whole.values()]
    return {
        "steps": steps,
        "equal losses": sum(difference == 0 for difference in apart),
        "of": len(apart),
        "largest difference": max(apart),
        "tokens/s": sorted(rates)[len(rates) // 2],
        "peak_memory_gib": whole[steps]["peak_memory_gib"],
    }


def cost_of_a_save(size: str) -> Figures:
    """Runs tests/benchmarks/save.py's measurement on this device, on one rank."""
    options = save.options_of([*SAVES[size].split(), "--ranks", "1"])
    with _folder() as folder, ranks():
        state, seconds, held, cost, work, written = save.times_on_rank(0, 1, folder, options)
        host = save.memory_on_rank(0, 1, folder, options, "asynchronous")
    names = {"held s": held, "whole cost s": cost, "CPU s": work, "on disk after s": written}
    return {
        "state MiB": state / MIB,
        "seconds per step": seconds,
        "extra host MiB": host,
        "saves": {kind: {name: values[kind] for name, values in names.items()} for kind in save.KINDS},
    }


@contextmanager
def _folder() -> Iterator[Path]:
    """Yields a folder and removes it. At its end a fork would remove a TemporaryDirectory of this process."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _warm() -> AbstractContextManager[object]:
    """Makes a `Command` a fork of this process, which has imported most of its modules."""
    return patch.object(warm, "context", multiprocessing.get_context("fork"))


def _succeeds(words: list[str], folder: Path = ROOT, popen: type[subprocess.Popen] = subprocess.Popen) -> None:
    """Runs `python WORDS` in `folder` with its output on this process's; it must exit with 0."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", *RANK_KEYS)}
    with popen([sys.executable, *words], cwd=folder, env=environment) as process:
        code = process.wait()
    assert code == 0, f"{shlex.join(['python', *words])} exited with {code}"


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

"""Kills a training with kill -9 many times, and compares the result with an uninterrupted training.

    python tests/reliability.py --kills 30 [--seed 0] [--engine fsdp2] [key=value ...]

Starts the real command on two ranks and kills one rank, or all ranks and the launcher, at random moments of steps and
saves. Runs the command again until it finishes, unless the launcher restarts the ranks itself. Then losses, norms,
weights and both moments must match the uninterrupted run bit for bit. Prints a tally in Markdown; exits 1 at the first
difference. key=value arguments go to the command. Kills only processes that it started, by pid.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import psutil
import torch

from pretrain.checkpoint import checkpoints, step_of
from pretrain.checkpoint.folder import MANIFEST_FILE, UNFINISHED, faults, read_manifest, set_aside_in
from tests.pretrain.tiny import VOCAB, saved_tensors, write_tokens

RANKS = 2
PATIENCE = 120  # seconds; each wait should take a few
VICTIMS = ("one rank", "one rank, restarted", "all")
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens")
SETTINGS = (
    f"nproc={RANKS} vocab.size={VOCAB} vocab.multiple=8 model.layers=2 model.width=24 model.heads=3 model.context=16"
    " train.global_batch=12 train.micro_batch=3 train.precision=fp32 optim.lr=1e-2 optim.warmup_steps=5 seed=7"
    " checkpoint.every=2 checkpoint.keep=2 log.every=1 log.tensorboard=false"
)
MOMENTS: dict[str, Callable[[Path], bool]] = {  # the state of the folder at the moment of the kill
    "no save at work": lambda run: not unfinished(run),
    "a save has begun": lambda run: any(files(folder) == 0 for folder in unfinished(run)),
    "between its files": lambda run: any(0 < files(folder) < RANKS for folder in unfinished(run)),
    "its manifest is missing": lambda run: any(files(f) >= RANKS and not sealed(f) for f in unfinished(run)),
    "its rename is missing": lambda run: any(sealed(f) and not old(run, f) for f in unfinished(run)),
    "an old one is being removed": lambda run: any(old(run, folder) for folder in unfinished(run)),
}


def main(arguments: list[str] | None = None, kind: "type[Loop] | None" = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="fsdp2")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = write_tokens(Path(folder) / "tokens")
        settings = f"data.path={data} {SETTINGS} train.steps={options.steps} engine={options.engine}".split()
        loop = (kind or Loop)(Path(folder), settings + options.settings, options.kills, options.steps, options.seed)
        loop.run()
    print(loop.table())


class Loop:
    """Repeats runs until there are enough kills and the last run has finished."""

    #: how a command is started, and the seconds after its start within which a kill may come
    popen: type[subprocess.Popen] = subprocess.Popen
    starting: tuple[float, float] = (3, 10)

    def __init__(self, folder: Path, settings: list[str], kills: int, steps: int, seed: int) -> None:
        self.folder, self.settings, self.kills, self.steps = folder, settings, kills, steps
        self.random = random.Random(seed)
        self.tally: Counter[tuple[str, str]] = Counter()
        self.runs = 0

    def run(self) -> None:
        straight = self.folder / "straight"
        process = self.start(straight, "all")
        assert process.wait(PATIENCE) == 0, self.said(straight)
        while self.tally.total() < self.kills:
            self.runs += 1
            run = self.folder / f"killed-{self.runs}"
            while not self.attempt(run):
                pass
            compare(run, straight, self.steps)
            print(f"run {self.runs}: equal after {self.tally.total()} kills so far", file=sys.stderr, flush=True)

    def start(self, run: Path, victims: str) -> subprocess.Popen:
        starts = f"restart.max_failures={1000 if victims == 'one rank, restarted' else 0}"
        command = [sys.executable, "launch/local.py", f"run.dir={run}", starts, *self.settings]
        with open(self.folder / f"{run.name}.log", "a") as log:
            return self.popen(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
            )

    def said(self, run: Path) -> str:
        return (self.folder / f"{run.name}.log").read_text()[-4000:]

    def attempt(self, run: Path) -> bool:
        """Starts the run, and kills it while kills are left. Returns True if the run finished."""
        victims = self.random.choice(VICTIMS)
        process = self.start(run, victims)
        launcher = psutil.Process(process.pid)
        while self.tally.total() < self.kills:
            ranks = self.wait_for(run, process, self.random.choice([*MOMENTS]))
            if not ranks:
                break
            for victim in [launcher, *ranks] if victims == "all" else [self.random.choice(ranks)]:
                victim.kill()
            found = next(name for name, shows in reversed(MOMENTS.items()) if shows(run))
            self.tally[found, victims] += 1
            print(f"kill {self.tally.total()}: {victims}, {found}", file=sys.stderr, flush=True)
            assert victims == "one rank, restarted" or process.wait(PATIENCE) != 0
            _, alive = psutil.wait_procs(ranks, PATIENCE)
            assert not alive, f"{alive} outlived the kill"
            if process.poll() is not None:
                return False
            victims = self.random.choice(VICTIMS[1:])  # among the ranks that the launcher restarted
        assert process.wait(PATIENCE) == 0, self.said(run)
        return True

    def wait_for(self, run: Path, process: subprocess.Popen, moment: str) -> list[psutil.Process]:
        """Waits for the moment, a random number of steps ahead. Returns the ranks; nothing if the run ends first."""
        starting, until = self.random.random() < 0.15, time.monotonic() + self.random.uniform(*self.starting)
        first = steps_logged(run) + self.random.randint(1, 1 + self.steps // 10)
        late = time.monotonic() + PATIENCE

        def there() -> bool:
            if starting:
                return time.monotonic() > until
            return steps_logged(run) >= first and MOMENTS[moment](run)

        launcher = psutil.Process(process.pid)
        ranks: list[psutil.Process] = []
        while process.poll() is None:
            assert time.monotonic() < late, f"{moment} did not come: {self.said(run)}"
            if len(ranks) < RANKS:
                ranks = launcher.children()
                time.sleep(0.05)
            elif there():
                time.sleep(self.random.choice([0, 0, self.random.uniform(0, 0.02)]))
                return ranks
            else:
                time.sleep(0.0005)  # the window may be short
        return []

    def table(self) -> str:
        lines = [f"| at the moment of the kill | {' | '.join(VICTIMS)} and the launcher |", "| --- | --: | --: | --: |"]
        for moment in MOMENTS:
            lines.append(f"| {moment} | {' | '.join(str(self.tally[moment, victims]) for victims in VICTIMS)} |")
        runs = f"{self.runs} run{'s' * (self.runs > 1)} of {self.steps} steps"
        return "\n".join([*lines, "", f"{self.tally.total()} kills, {runs}: all equal to the uninterrupted run."])


def compare(run: Path, straight: Path, steps: int) -> None:
    """Raises AssertionError at the first difference."""
    for folder in (run, straight):
        assert steps_logged(folder) == steps == step_of(checkpoints(folder)[-1]), folder
        assert not unfinished(folder) and not set_aside_in(folder), f"{folder} was not tidied up"
        for checkpoint in checkpoints(folder):
            assert not [*faults(checkpoint, read_manifest(checkpoint))], checkpoint
    assert [path.name for path in checkpoints(run)] == [path.name for path in checkpoints(straight)]
    for ours, theirs in zip(metrics(run), metrics(straight), strict=True):
        assert all(ours[key] == theirs[key] for key in COMPARED), f"{ours} is not {theirs}"
    ours, theirs = saved_tensors(run), saved_tensors(straight)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"{name} differs"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_logged(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def unfinished(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(f"{UNFINISHED}*"))


def files(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def sealed(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists()


def old(run: Path, folder: Path) -> bool:
    """True if an old checkpoint is being removed: a save never writes an older step than the existing ones."""
    done = checkpoints(run)
    return bool(done) and int(folder.name.rpartition("-")[2]) < step_of(done[-1])


if __name__ == "__main__":
    main()

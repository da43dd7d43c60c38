"""Trains from a store and from the disk, and compares how long the steps wait for their batches.

    python tests/benchmarks/stores.py [--data data/stdlib] [--steps 100] [--delays 0 50] [--settings KEY=VALUE …]

Serves the token files by an S3 server on loopback, in a process of its own, that waits for some milliseconds before
each answer. Each run begins with an empty cache. Prints Markdown: the share of the time in which steps waited for their
batches, with and without the first step, which waits for the first blocks; the same in milliseconds per step; and if
the losses are those of the disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.benchmarks.measure import markdown
from tests.launch.commands import run as launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--delays", type=float, nargs="*", default=[0, 50], help="milliseconds before each answer")
    parser.add_argument("--settings", nargs="*", default=[], help="of the training")
    options = parser.parse_args()
    settings = [f"train.steps={options.steps}", *options.settings]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = {"disk": trained(folder / "disk", options.data.resolve(), settings, {})}
        for delay in options.delays:
            lines[f"store, {delay:g} ms per answer"] = from_store(folder / f"{delay}", options.data, settings, delay)
    losses = [line["loss"] for line in lines["disk"]]
    rows = [
        [
            kind,
            f"{waited(each) / seconds(each):.2%}",
            f"{waited(each[1:]) / seconds(each[1:]):.2%}",
            f"{1e3 * waited(each[:1]):,.0f}",
            f"{1e3 * waited(each[1:]) / len(each[1:]):.2f}",
            "yes" if [line["loss"] for line in each] == losses else "no",
        ]
        for kind, each in lines.items()
    ]
    print(f"{options.steps} steps of {seconds(lines['disk'][1:]) / (options.steps - 1):.2f} s on the disk\n")
    columns = ["data wait", "after step 1", "step 1, ms", "later steps, ms", "same losses"]
    print(markdown(["token files", *columns], rows))


def from_store(folder: Path, data: Path, settings: list[str], delay: float) -> list[dict[str, float]]:
    serve = [sys.executable, "tests/object_store.py", str(data.resolve()), "--delay", str(delay / 1e3)]
    with subprocess.Popen(serve, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        url, *environment = server.stdout.readline().split()
        given = dict(line.split("=", 1) for line in environment)
        lines = trained(folder, url, [*settings, f"data.cache={folder}/cache"], given)
        server.stdin.close()  # ends it
    return lines


def trained(run: Path, data: Path | str, settings: list[str], environment: dict[str, str]) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl, one per step."""
    fixed = ["nproc=2", "model=nano", "log.every=1", "log.tensorboard=false", "eval.every=0"]
    command = " ".join(["launch/local.py", *fixed, f"data.path={data}", f"run.dir={run}", *settings])
    done = launched(command, timeout=3600, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data_wait" in line]


def seconds(lines: list[dict[str, float]]) -> float:
    return sum(line["step_s"] for line in lines)


def waited(lines: list[dict[str, float]]) -> float:
    """Seconds for which these steps waited for their batches."""
    return sum(line["data_wait"] * line["step_s"] for line in lines)


if __name__ == "__main__":
    main()

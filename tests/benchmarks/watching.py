"""Measures the cost of a monitor: steps with and without it alternate in one run.

    python tests/benchmarks/watching.py --data data/stdlib [--monitor embedding] [--settings model=gpt2 …]

Prints Markdown.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pretrain.config.job import JobConfig
from pretrain.trainer import Trainer
from tests.benchmarks.measure import markdown
from tests.benchmarks.plan import configured
from tests.pretrain.tiny import train_rank
from tests.ranks import run_ranks

CADENCES = (25, 50, 100, 250, 500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--monitor", default="embedding", help="embedding or lens")
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--settings", nargs="*", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = [f"data.path={options.data}", f"run.dir={folder}/run", f"train.steps={options.steps}"]
        ours += [f"monitor.{options.monitor}_every=2", "log.every=1000000", "eval.every=0", "eval.max_windows=1"]
        config = configured(*options.settings, *ours, "checkpoint.every=0")
        plain, watched = run_ranks(options.ranks, seconds_of_steps, config, timeout=3600)[0]
    extra = watched - plain
    print(
        f"\n{options.ranks} ranks, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f};"
        f" monitor.{options.monitor}_every; {' '.join(options.settings)}: a step takes {plain:.3f} s,"
        f" the monitor adds {extra:+.3f} s\n"
    )
    rows = [[f"{every}", f"{100 * extra / (every * plain):.2f}%"] for every in CADENCES]
    print(markdown(["measures every", "of the run"], rows))


def seconds_of_steps(rank: int, world: int, config: JobConfig) -> tuple[float, float]:
    """The median seconds of the odd and of the even steps, from step end to step end, without the first ones."""
    edges: list[float] = []
    agree = Trainer.agree

    def timed(self: Trainer, number: int) -> int:
        total = agree(self, number)
        if number:  # hooks agree as well, whether to stop, with 0
            edges.append(time.perf_counter())
        return total

    Trainer.agree = timed  # type: ignore[method-assign]
    train_rank(rank, world, config)
    taken = [after - before for before, after in pairwise(edges)][: config.train.steps - 1]
    odd, even = taken[4::2], taken[5::2]
    return statistics.median(odd), statistics.median(even)


if __name__ == "__main__":
    main()

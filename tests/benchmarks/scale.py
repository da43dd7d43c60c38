"""Simulates weak scaling of llama_8b from 8 to 4,096 H100s. Arithmetic only: nothing is run or measured.

    python tests/benchmarks/scale.py [--rows 131072 524288] [--ranks 8 64 512 4096] [--sequences 1] [--teraflops 790]
    python tests/benchmarks/scale.py --all           every layout

Prints Markdown: of each system the fastest layout that fits, the smallest among equals. The formulas are in
scale_model.py, the assumptions in docs/benchmarks.md. tests/benchmarks/pictures.py draws the same as docs/scale.png.
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.hardware import GIB
from tests.benchmarks.measure import MIB, markdown
from tests.benchmarks.plan import configured
from tests.benchmarks.scale_model import CHUNKS, H100, Fabric, Point, Training, fastest, fsdp2, megatron, rowshard

SYSTEMS: dict[str, Callable[[Training], list[Point]]] = {
    "Rowshard": rowshard,
    "FSDP2": fsdp2,
    "FSDP2, chunked loss": partial(fsdp2, chunks=CHUNKS),
    "Megatron-Core": megatron,
    "Megatron-Core, overlapped": partial(megatron, hides=True),
}
LENGTH = 8192  # tokens of a sequence
ROWS = (131_072, 524_288)
HEADER = ["GPUs", "system", "layout", "tokens/s per GPU", "GiB", "MiB sent for the vocabulary"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096], help="powers of two")
    parser.add_argument("--sequences", type=int, default=1, help="of 8,192 tokens, per rank and step")
    parser.add_argument("--teraflops", type=float, default=790, help="per second, attained by the matmuls")
    parser.add_argument("--all", action="store_true", help="every layout, also those that do not fit")
    options = parser.parse_args()
    if any(ranks < 1 or ranks & (ranks - 1) for ranks in options.ranks):
        parser.error(f"--ranks {options.ranks} must be powers of two")
    fabric = Fabric(flops=options.teraflops * 1e12)
    for rows in options.rows:
        trainings = [training_of(rows, ranks, options.sequences, fabric) for ranks in options.ranks]
        lines = [cells for training in trainings for name in SYSTEMS for cells in lines_of(name, training, options.all)]
        tokens = options.sequences * LENGTH
        print(f"\nsimulated, llama_8b untied, {rows:,} rows, {tokens:,} tokens per GPU and step\n")
        print(markdown(HEADER, lines))


@cache
def training_of(rows: int, ranks: int, sequences: int = 1, fabric: Fabric = H100) -> Training:
    """llama_8b, bf16, selective checkpointing, one micro-batch per rank and step."""
    settings = f"model=llama_8b train.seq_len={LENGTH} train.precision=bf16 engine.activation_checkpointing=selective"
    batch = [f"train.micro_batch={sequences}", f"train.global_batch={sequences * ranks}"]
    return Training(configured(*settings.split(), *batch), rows, ranks, fabric)


def lines_of(name: str, training: Training, everything: bool) -> list[list[str]]:
    """Returns a line for the fastest layout that fits, or for every layout."""
    points = SYSTEMS[name](training)
    best = fastest(points)
    if not everything:
        points = [best or min(points, key=lambda point: point.memory)]
    lines = []
    for point in points:
        rate = f"{point.rate:,.0f}" if point.fits else "does not fit"
        figures = [rate, f"{point.memory / GIB:.0f}", f"{point.head / MIB:,.0f}"]
        lines.append([f"{training.world:,}", name, point.layout, *figures])
    return lines


if __name__ == "__main__":
    main()

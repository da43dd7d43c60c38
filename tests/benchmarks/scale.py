"""Simulates weak scaling of llama_8b from 8 to 4,096 H100s. Arithmetic only: nothing is run or measured.

    python tests/benchmarks/scale.py [--rows 131072 524288] [--ranks 8 64 512 4096] [--sequences 1]

Prints Markdown: the fastest layout of each system that fits. The formulas are in scale_model.py, the assumptions in
docs/benchmarks.md. tests/benchmarks/pictures.py draws the same as docs/scale.png.
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
from tests.benchmarks.scale_model import CHUNKS, Point, Training, fastest, fsdp2, megatron, rowshard

SYSTEMS: dict[str, Callable[[Training], list[Point]]] = {
    "Rowshard": rowshard,
    "FSDP2": fsdp2,
    "FSDP2, chunked loss": partial(fsdp2, chunks=CHUNKS),
    "Megatron-Core": megatron,
}
ROWS = (131_072, 524_288)
HEADER = ["ranks", "system", "fastest layout that fits", "tokens/s per GPU", "GiB", "MiB sent for the vocabulary"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096], help="powers of two")
    parser.add_argument("--sequences", type=int, default=1, help="of 8,192 tokens, per rank and step")
    options = parser.parse_args()
    if any(ranks & (ranks - 1) for ranks in options.ranks):
        parser.error(f"--ranks {options.ranks} must be powers of two")
    for rows in options.rows:
        lines = [line(name, rows, ranks, options.sequences) for ranks in options.ranks for name in SYSTEMS]
        print(f"\nsimulated, llama_8b untied, {rows:,} rows, {options.sequences * 8192:,} tokens per rank and step\n")
        print(markdown(HEADER, lines))


@cache
def training_of(rows: int, ranks: int, sequences: int = 1) -> Training:
    """llama_8b, bf16, selective checkpointing, one micro-batch per rank and step."""
    settings = "model=llama_8b train.seq_len=8192 train.precision=bf16 engine.activation_checkpointing=selective"
    batch = [f"train.micro_batch={sequences}", f"train.global_batch={sequences * ranks}"]
    return Training(configured(*settings.split(), *batch), rows, ranks)


def line(name: str, rows: int, ranks: int, sequences: int) -> list[str]:
    points = SYSTEMS[name](training_of(rows, ranks, sequences))
    point = fastest(points)
    if point is None:
        least = min(one.memory for one in points)
        return [f"{ranks:,}", name, "none", "does not fit", f"{least / GIB:.0f}", ""]
    figures = [f"{point.rate:,.0f}", f"{point.memory / GIB:.0f}", f"{point.head / MIB:,.0f}"]
    return [f"{ranks:,}", name, point.layout, *figures]


if __name__ == "__main__":
    main()

"""Measures the head and its loss, forward and backward, against its rivals: time and extra peak memory.

    python tests/benchmarks/head.py [--vocab 50304 ...] [--tokens 4096 ...] [--width 1024] [--precision fp32]
    python tests/benchmarks/head.py --ranks 2        on ranks that split the rows, with errors against float64
    python tests/benchmarks/head.py --sweep          for several vocabularies

Prints Markdown. Times are medians of interleaved repetitions in one process, as ratios to the three matmuls that every
implementation needs. Memory is measured in a fresh process for each. Run it on a quiet machine.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from tests.benchmarks.measure import extra_peak_mib, in_fresh_process, interleaved_times, markdown, progress
from tests.benchmarks.rivals import RANK_RIVALS, RIVALS, Problem, lacks
from tests.ranks import run_ranks

SWEEP = [32_768, 50_304, 131_072, 262_144, 524_288]
LIMIT = "three bare matmuls"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # fp32 for CPUs whose bf16 matmuls are slow
Size = tuple[int, int, int]  # tokens, width, vocab
Figures = dict[str, tuple[float, float]]  # seconds, MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50_304])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the rivals, besides the bare matmuls")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    known = RIVALS if options.ranks == 1 else RANK_RIVALS
    if options.sweep and len(options.tokens) > 1:
        parser.error("--sweep is over the vocabulary: give one number of --tokens")
    if unknown := set(options.only or []) - set(known):
        parser.error(f"--only {sorted(unknown)} must be among {list(known)}")
    vocabularies = SWEEP if options.sweep else options.vocab
    sizes = [(tokens, options.width, vocab) for tokens in options.tokens for vocab in vocabularies]
    if options.ranks > 1:
        for size in sizes:
            print(table_on_ranks(size, options.precision, options.ranks, options.repeats, options.only))
        return
    wanted = RIVALS if options.only is None else (LIMIT, *options.only)
    names = [name for name in RIVALS if name in wanted and not lacks(name)]
    precision = options.precision
    # All times first: noise does not change memory.
    seconds = [times(names, size, precision, options.repeats) for size in sizes]
    for size, of_size in zip(sizes, seconds, strict=True):
        figures = {name: (of_size[name], memory(name, size, precision)) for name in names}
        print(table(size, precision, figures), flush=True)


def times(names: list[str], size: Size, precision: str, repeats: int) -> dict[str, float]:
    progress(f"{size}: time")
    problem = Problem.draw(*size, DEVICE, DTYPES[precision])
    return interleaved_times({name: RIVALS[name](problem) for name in names}, repeats)


def memory(name: str, size: Size, precision: str) -> float:
    progress(f"{size}: memory of {name}")
    return in_fresh_process(_memory_here, name, size, precision)


def _memory_here(name: str, size: Size, precision: str) -> float:
    return extra_peak_mib(RIVALS[name](Problem.draw(*size, DEVICE, DTYPES[precision])))


def table(size: Size, precision: str, figures: Figures) -> str:
    limit, tokens, width, vocab = figures[LIMIT][0], *size
    rows = [
        [name, f"{seconds:.2f}" if DEVICE == "cpu" else f"{seconds:.4f}", f"{seconds / limit:.2f}", f"{mib:,.0f}"]
        for name, (seconds, mib) in figures.items()
    ]
    title = f"\n{_machine()}, {precision}, {tokens:,} tokens, width {width:,}, {vocab:,} rows"
    title += f"; the gradient of the rows alone: {vocab * width * 4 / 2**20:,.0f} MiB in fp32"
    title += f" (Rowshard), {vocab * width * 2 / 2**20:,.0f} in bf16\n\n" if precision == "bf16" else "\n\n"
    return title + markdown(["forward and backward", "seconds", "× matmuls", "extra peak MiB"], rows)


def _machine() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"


# --- on ranks ---------------------------------------------------------------------------------------------------------


def table_on_ranks(size: Size, precision: str, world: int, repeats: int, only: list[str] | None) -> str:
    """Seconds, memory per rank, and the errors of dX and dW against float64."""
    names = [name for name in RANK_RIVALS if only is None or name in only]
    progress(f"{size} on {world} ranks: time and errors")
    seconds, *errors = run_ranks(world, times_on_rank, size, precision, repeats, names, timeout=3600)[0]
    rows = []
    for name in names:
        progress(f"{size} on {world} ranks: memory of {name}")
        mib = max(run_ranks(world, memory_on_rank, size, precision, name, timeout=600))
        dx, dw = (error[name] for error in errors)
        rows.append([name, f"{seconds[name]:.2f}", f"{seconds[name] / seconds[names[0]]:.2f}", f"{mib:,.0f}", dx, dw])
    tokens, width, vocab = size
    title = f"\n{world} ranks, CPU, 1 thread each, {precision}, {tokens:,} tokens in all,"
    title += f" width {width:,}, {vocab:,} rows\n\n"
    header = ["forward and backward", "seconds", "× the first", "extra peak MiB per rank", "error of dX", "error of dW"]
    return title + markdown(header, rows)


def times_on_rank(
    rank: int, world: int, size: Size, precision: str, repeats: int, names: list[str]
) -> tuple[dict, dict, dict]:
    """Median seconds and relative errors of dX and dW (this rank's part), by name."""
    problem = Problem.draw(*size, "cpu", DTYPES[precision])
    steps = {name: RANK_RIVALS[name](problem, rank, world) for name in names}
    dhidden_ND, dweight_VD = problem.truth()
    dweight_vD = dweight_VD.chunk(world)[rank]
    errors: tuple[dict, dict] = ({}, {})
    for name, step in steps.items():
        mine = dhidden_ND.chunk(world)[rank] if "distinct" in name else dhidden_ND
        for error, made, truth in zip(errors, step(), (mine, dweight_vD), strict=True):
            error[name] = f"{float((made.double() - truth).norm() / truth.norm()):.1e}"
    del dhidden_ND, dweight_VD, dweight_vD
    return interleaved_times(steps, repeats, before=dist.barrier), *errors


def memory_on_rank(rank: int, world: int, size: Size, precision: str, name: str) -> float:
    return extra_peak_mib(RANK_RIVALS[name](Problem.draw(*size, "cpu", DTYPES[precision]), rank, world))


if __name__ == "__main__":
    main()

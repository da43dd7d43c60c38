"""Measures and checks everything that a GPU has to show, in phases of parts. Each part is a process of its own.

    python tests/gpu.py --list
    python tests/gpu.py correct head [--only WORD ...] [--out DIR] [--minutes 9] [--size small]
    python tests/gpu.py report DIR [--page PAGE]     writes the GPU's part of docs/benchmarks.md from DIR
    python tests/gpu.py prepare                      brings the packages that a machine with torch alone lacks

A phase writes DIR/PHASE.json after each part. A part that fails, or finds no time, is named, and the next one goes on;
then the exit code is 1. `--size small` is a rehearsal, which needs no GPU. DIR is $OUT, or gpu_results.
"""

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

SIZES = ("full", "small")


def main() -> None:
    from tests.gpu_phases.prepare import prepare, use

    if sys.argv[1:] == ["prepare"]:  # needs no torch
        prepare()
        return
    use()
    from tests.gpu_phases import correct, demo, head, report, step, trace
    from tests.gpu_phases.running import Runner, say

    modules = {"correct": correct, "head": head, "step": step, "demo": demo, "trace": trace}
    if sys.argv[1:2] == ["report"]:
        report.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "phases", nargs="*", choices=[*modules, []], metavar="PHASE", help=f"among {', '.join(modules)}"
    )
    parser.add_argument("--list", action="store_true", help="print the phases and their parts")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="parts whose names contain one of these")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_results")))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all phases together")
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()
    out = options.out.resolve()
    chosen = {
        phase: {
            name: part
            for name, part in modules[phase].parts(options.size == "small", out).items()
            if options.only is None or any(word in name for word in options.only)
        }
        for phase in options.phases or (modules if options.list else [])
    }
    if options.list:
        for phase, parts in chosen.items():
            print("\n  ".join([phase, *parts]))
        return
    if not any(chosen.values()):
        parser.error("no part is chosen: see --list")
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "tests/gpu.py", *sys.argv[1:]])
    late = time.monotonic() + 60 * options.minutes
    runner = Runner(out, options.size, command, late, multiprocessing.get_context("spawn"))
    failed = [name for phase, parts in chosen.items() for name in runner.run(phase, parts)]
    for name in failed:
        say(f"failed: {name}")
    say(f"{out}: {', '.join(f'{phase}.json' for phase in chosen)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""Time and peak memory of a step: ratios taken in one run, memory each in a process of its own."""

import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

M_MMAP_THRESHOLD = -3
MIB = 2**20
Step = Callable[[], Any]


def interleaved_times(steps: Mapping[str, Step], repeats: int, before: Step = lambda: None) -> dict[str, float]:
    """Median seconds of each step. All take turns, so that a busy moment of the machine falls on all alike.

    A first round is not counted. `before` runs ahead of every step: a barrier, where there are ranks.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            before()
            start = time.perf_counter()
            step()
            _finish()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def free_at_once() -> None:
    """From now on memory that this process frees is the system's again, and leaves no gaps."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)


def extra_peak_mib(step: Step) -> float:
    """How much more memory the process has held during the step than before it, in MiB.

    What the step keeps is released and given back to the system after a first, uncounted run.
    """
    step()
    _finish()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _finish()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    before = status_mib("VmRSS")
    step()
    return status_mib("VmHWM") - before


def holding_peak_mib(build: Callable[[], Step]) -> float:
    """How much a step has held at most of what the process did not hold before `build`, in MiB: all that is built, too.

    The first, uncounted step makes what is kept, such as moments.
    """
    before = status_mib("VmRSS")
    step = build()
    step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    step()
    return status_mib("VmHWM") - before


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process that has run nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table, numbers to the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {key}")

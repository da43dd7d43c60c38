"""Measures time and peak memory of a step: times interleaved in one run, memory in separate processes.

torch is imported where it is used: the processes of tokenising.py start without it.
"""

import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3
MIB = 2**20
Step = Callable[[], Any]


def interleaved_times(steps: Mapping[str, Step], repeats: int, before: Step = lambda: None) -> dict[str, float]:
    """Median seconds of each step. The steps take turns, so that a busy moment of the machine affects all equally.

    The first round is not counted. `before` runs ahead of every step; with ranks it is a barrier.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            before()
            start = time.perf_counter()
            step()
            finish()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def free_at_once() -> None:
    """Makes this process return freed memory to the system at once, without gaps."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)


def extra_peak_mib(step: Step) -> float:
    """The peak memory of the process during the step, in MiB above its memory before the step.

    A first, uncounted run is done before; its memory is released and returned to the system.
    """
    import torch

    step()
    finish()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        finish()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current memory
    before = status_mib("VmRSS")
    step()
    return status_mib("VmHWM") - before


def holding_peak_mib(build: Callable[[], Step]) -> float:
    """The peak memory of the process during a step, in MiB above its memory before `build`: it includes what is built.

    A first, uncounted step allocates what is kept, for example moments. On a GPU: its memory.
    """
    import torch

    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        step = build()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    before = status_mib("VmRSS")
    step = build()
    step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current memory
    step()
    return status_mib("VmHWM") - before


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Runs function(*args) in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table with right-aligned numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def finish() -> None:
    """Waits for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {key}")

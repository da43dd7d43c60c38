"""A profile of five steps, with its trace, and a snapshot of the memory of one step."""

import gzip
import shutil
import time
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pretrain.mesh import ranks
from pretrain.precision import compute_dtype
from tests.benchmarks import step as benchmark
from tests.benchmarks.measure import MIB, finish
from tests.gpu_phases.running import Figures, Part
from tests.gpu_phases.step import configuration

STEPS, TOP = 5, 10
MODEL, ROWS = "llama_1b", 131_072
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def parts(small: bool, out: Path) -> dict[str, Part]:
    return {
        "five steps": partial(five_steps, small, out / "trace.json.gz"),
        "memory of a step": partial(memory, small, out / "memory.pickle.gz"),
    }


def stepper(small: bool, device: torch.device) -> benchmark.Step:
    """Builds the trainer's step of the model, and warms it up."""
    rows = 512 if small else ROWS
    config = configuration(MODEL, rows, small)
    dtype = compute_dtype(config.train, device.type)
    step = benchmark.rowshard(config.model, rows, config.train.micro_batch, dtype)
    for _ in range(3):
        step()
    finish()
    return step


def five_steps(small: bool, path: Path) -> Figures:
    """The operations with the most time of their own on the device, and how often the host waited for it."""
    with ranks() as device:
        step = stepper(small, device)
        on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities) as profiled:
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            finish()
            seconds = time.perf_counter() - start
    profiled.export_chrome_trace(str(path))
    events = profiled.key_averages()
    counts = {event.key: event.count for event in events}
    if on_gpu:  # only kernels and copies: the time of operations and of named ranges is theirs
        events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    own = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 for event in events}
    busy = sum(own.values())
    top = sorted(own, key=lambda key: own[key], reverse=True)[:TOP]
    return {
        "model": MODEL,
        "steps": STEPS,
        "seconds per step": seconds / STEPS,
        "top": [{"operation": key[:100], "share": own[key] / busy, "calls": counts[key] / STEPS} for key in top],
        "busy": busy / seconds,
        "launches per step": counts.get("cudaLaunchKernel", 0) / STEPS,
        "waits per step": sum(counts.get(key, 0) for key in WAITS) / STEPS,
        "trace": path.name,
        "trace MiB": path.stat().st_size / MIB,
    }


def memory(small: bool, path: Path) -> Figures:
    """Records each allocation of a step, for torch's viewer of memory snapshots. A CPU has no such record."""
    with ranks() as device:
        step = stepper(small, device)
        if device.type != "cuda":
            return {"snapshot": None}
        torch.cuda.memory._record_memory_history(max_entries=100_000, stacks="python")
        step()
        finish()
        raw = path.with_suffix("")
        torch.cuda.memory._dump_snapshot(str(raw))
        torch.cuda.memory._record_memory_history(enabled=None)
        with raw.open("rb") as source, gzip.open(path, "wb") as target:
            shutil.copyfileobj(source, target)
        raw.unlink()
        return {"snapshot": path.name, "peak MiB": torch.cuda.max_memory_allocated() / MIB}

"""Error message of a rank that runs out of memory: what was requested, what was free, and which settings need less.

Not part of train.py, which uses no settings of an engine.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .config.job import JobConfig
from .mesh import Mesh

GIB = 2**30
HOST = "DefaultCPUAllocator"  # torch raises a RuntimeError that differs from others only in its text
ASKED = re.compile(r"tried to allocate (\d+) bytes")


class OutOfMemory(Exception):
    """The GPU or the host of a rank is out of memory. The text is the whole line for the user."""


@contextmanager
def shortage_named(config: JobConfig, mesh: Mesh) -> Iterator[None]:
    """Raises OutOfMemory in place of the errors of torch, CUDA and Python when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        on_host = isinstance(error, MemoryError) or HOST in str(error)
        less = _need_less(config, mesh, of_host=on_host)[:3] or ["a smaller train.seq_len", "more ranks"]
        what = _host_shortage(error) if on_host else str(error).partition(" If reserved")[0].splitlines()[0]
        raise OutOfMemory(f"{what.rstrip('.')}. To need less: {', or '.join(less)}") from error


def _is_shortage(error: Exception) -> bool:
    text = str(error)
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or HOST in text or ("CUDA" in text and "out of memory" in text)


def _host_shortage(error: Exception) -> str:
    asked = ASKED.search(str(error))
    what = f"tried to allocate {int(asked[1]) / GIB:.2f} GiB" if asked else "an allocation failed"
    free = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    rest = f"; {int(free[1]) * 1024 / GIB:.2f} GiB are free" if free else ""
    return f"the host is out of memory: {what}{rest}"


def _need_less(config: JobConfig, mesh: Mesh, *, of_host: bool) -> list[str]:
    """Lists settings that need less memory than the run's, the one that costs least time first."""
    engine, on_gpu = config.engine, mesh.device.type == "cuda"
    less = []
    if of_host and on_gpu:
        if engine.offload != "none":
            less.append("engine.offload=none")
        if config.checkpoint.asynchronous:
            less.append("checkpoint.asynchronous=false")
        if config.data.prefetch > 1:
            less.append("data.prefetch=1")
        return less
    if (batch := config.train.micro_batch) > 1:
        less.append(f"train.micro_batch={max(part for part in range(1, batch) if batch % part == 0)}")
    if engine.activation_checkpointing != "block":
        less.append("engine.activation_checkpointing=block")
    less += engine.less_memory(mesh.world, mesh.replicas)
    if mesh.replicas > 1:
        less.append(f"vocab.parallel={mesh.world}")
    if of_host and config.checkpoint.asynchronous:
        less.append("checkpoint.asynchronous=false")
    if on_gpu and engine.offload == "none" and config.optim.can_offload:
        less.append("engine.offload=cpu" if engine.can_offload else "engine.zero_stage=3 engine.offload=cpu")
    return less

"""Reads a trace of torch.profiler: the time of each part of a step, and of each operation in it. Needs no torch.

On a CPU an operation's time is its own on the thread that trains, without the operations that it calls; what is left of
a part is Python and waiting. On a GPU an operation is a kernel or a copy; it belongs to the part that launched it.
"""

import gzip
import json
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..timeline import PARTS

SUFFIX = ".pt.trace.json.gz"  # as TensorBoard's plugin looks for it
STEP = "ProfilerStep#"
REST = "(Python and waiting)"
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of what a GPU does
LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]
Span = tuple[float, float]  # start and end, microseconds


@dataclass(frozen=True)
class Row:
    """Time of one part, or of one operation in it, per step."""

    part: str
    operation: str  # "": all of the part
    milliseconds: float
    share: float  # of the step
    calls: float


@dataclass(frozen=True)
class TraceSummary:
    """Contents of a trace. Rows are sorted by time, longest first; those of the parts are in the order of a step."""

    steps: list[int]
    milliseconds: float  # per step, from its first part to the next step's
    parts: list[Row]
    operations: list[Row]
    on_gpu: bool
    exposed: float  # milliseconds per step in which the GPU only communicates; 0 on a CPU


def trace_folder(run: Path) -> Path:
    return run / "profile"


def traces(run: Path) -> list[Path]:
    """Traces of a run, oldest first."""
    return sorted(trace_folder(run).glob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_mtime, path.name))


def read_trace(path: Path) -> TraceSummary:
    """Reads a trace that a run has written. Raises ValueError if it is damaged, or has no step of a run."""
    try:
        with gzip.open(path, "rt") as file:
            found = json.load(file)["traceEvents"]
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it") from error
    events = [event for event in found if event.get("ph") == "X" and "dur" in event]
    steps = {int(e["name"].removeprefix(STEP)): e for e in events if _is_label(e) and e["name"].startswith(STEP)}
    if not steps:
        raise ValueError(f"{path} has no step: it must be a trace that profile.steps has written")
    thread = next(iter(steps.values()))["tid"]
    labels = sorted((e for e in events if _is_label(e) and e["name"] in PARTS and e["tid"] == thread), key=_start)
    parts = Labels([(_start(e), _end(e), e["name"]) for e in labels])
    total = sum(step["dur"] for step in steps.values())
    begin, end = min(map(_start, steps.values())), max(map(_end, steps.values()))
    device = [e for e in events if e.get("cat") in DEVICE and begin <= _start(e) < end]
    uses = list(_launched(device, events, parts) if device else _own_times(events, thread, parts))

    def rows(keyed: Iterable[tuple[tuple[str, str], float]]) -> list[Row]:
        times, calls = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for key, duration in keyed:
            times[key] += duration  # type: ignore[assignment]
            calls[key] += 1
        count = len(steps)
        return [
            Row(*key, time / 1000 / count, time / total if total else 0.0, calls[key] / count)
            for key, time in times.most_common()
        ]

    of_parts = rows(((e["name"], ""), e["dur"]) for e in labels if parts.at(_start(e)))
    return TraceSummary(
        steps=sorted(steps),
        milliseconds=total / 1000 / len(steps),
        parts=sorted(of_parts, key=lambda row: PARTS.index(row.part)),
        operations=rows(uses),
        on_gpu=bool(device),
        exposed=_exposed(device) / 1000 / len(steps),
    )


class Labels:
    """The parts in time."""

    def __init__(self, spans: list[tuple[float, float, str]]) -> None:
        self._spans, self._starts = spans, [start for start, _, _ in spans]

    def at(self, time: float) -> str:
        """Returns the part at that time, or "" between the parts."""
        i = bisect_right(self._starts, time) - 1
        return self._spans[i][2] if i >= 0 and time < self._spans[i][1] else ""


def _own_times(events: list[Event], thread: Any, parts: Labels) -> Iterator[tuple[tuple[str, str], float]]:
    """Yields the time that each operation of the thread has spent itself, with its part and name."""
    mine = [e for e in events if e["tid"] == thread and e.get("cat") in ("cpu_op", "user_annotation")]
    own, open_ = dict[int, float](), list[Event]()
    for event in sorted(mine, key=lambda e: (_start(e), -e["dur"])):
        while open_ and _start(event) >= _end(open_[-1]):
            open_.pop()
        if open_:
            own[id(open_[-1])] -= event["dur"]
        own[id(event)] = event["dur"]
        open_.append(event)
    for event in mine:
        part, name = parts.at(_start(event)), event["name"]
        if part and not name.startswith(STEP):
            yield (part, REST if _is_label(event) and name == part else name), max(0.0, own[id(event)])


def _launched(device: list[Event], events: list[Event], parts: Labels) -> Iterator[tuple[tuple[str, str], float]]:
    """Yields the time of each kernel and copy, with the part that launched it."""
    launches = {e["args"].get("correlation"): _start(e) for e in events if e.get("cat") in LAUNCHES}
    for event in device:
        launched = launches.get(event["args"].get("correlation"))
        part = "" if launched is None else parts.at(launched)
        if part:
            yield (part, event["name"]), event["dur"]


def _exposed(device: list[Event]) -> float:
    """Microseconds in which the GPU runs NCCL's kernels and no other kernel."""
    kinds = defaultdict[bool, list[Span]](list)
    for event in device:
        kinds["nccl" in event["name"].lower()].append((_start(event), _end(event)))
    return _length([*kinds[True], *kinds[False]]) - _length(kinds[False])


def _length(spans: list[Span]) -> float:
    """Length of the union of spans."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _is_label(event: Event) -> bool:
    return event.get("cat") == "user_annotation"


def _start(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])

"""How long the parts of a step take, on a CPU and on a GPU. Not part of timeline.py, which needs no torch."""

import threading
import time
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from .timeline import PARTS


class Clock:
    """Measures the parts of single steps, on the host's clock.

    For CPUs, where the host waits for each operation. Also adds up how long this thread waits for collectives.
    """

    def __init__(self) -> None:
        self._on, self._marks = False, list[tuple[str, Any]]()
        self._waits = Waits()

    def begin(self, measure: bool) -> None:
        """Forgets the step before. measure: the step that begins is to be measured, up to a call of `seconds`."""
        self._on, self._marks = measure, []
        self._waits.watch(measure)

    def mark(self, part: str) -> None:
        if self._on:
            self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Ends the measurement. Returns the seconds of each part, and `communication_s`; empty if there is none.

        The last mark ends the part before it. `communication_s` is a share of the parts, not one more.
        """
        self._stop()
        if not self._marks:
            return {}
        found = dict.fromkeys((f"step_s/{part}" for part in PARTS), 0.0)
        for (part, start), (_, end) in pairwise(self._marks):
            found[f"step_s/{part}"] += self._between(start, end)
        return found | self._communication()

    def _stop(self) -> None:
        self._on = False
        self._waits.watch(False)

    def _now(self) -> Any:
        return time.monotonic(), self._waits.seconds

    def _between(self, start: Any, end: Any) -> float:
        return float(end[0] - start[0])

    def _communication(self) -> dict[str, float]:
        return {"communication_s": self._marks[-1][1][1] - self._marks[0][1][1]}


class DeviceClock(Clock):
    """Measures the parts on the GPU's current stream, by events; the host waits for nothing.

    Read it when the stream has passed the last mark, such as after the loss has arrived on the host. Communication has
    streams of its own: torch.profiler shows how much of it is exposed.
    """

    def begin(self, measure: bool) -> None:
        self._on, self._marks = measure, []

    def seconds(self) -> dict[str, float]:
        self._on = False
        passed = bool(self._marks) and self._marks[-1][1].query()
        return super().seconds() if passed else {}

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    def _communication(self) -> dict[str, float]:
        return {}


def clock_of(device: torch.device) -> Clock:
    """Returns a clock for steps on this device."""
    return DeviceClock() if device.type == "cuda" else Clock()


class Waits:
    """Seconds for which this thread has waited for collectives of any module, the engines' included.

    On a CPU, each collective ends with `dist.Work.wait`, which is replaced while a step is measured.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.wait: Any = dist.Work.wait
        self._thread = threading.get_ident()

    def watch(self, on: bool) -> None:
        waits = self

        def wait(work: dist.Work, *given: Any) -> Any:
            start = time.monotonic()
            done = waits.wait(work, *given)  # the launcher's supervisor knows this line by its wait
            if threading.get_ident() == waits._thread:
                waits.seconds += time.monotonic() - start
            return done

        dist.Work.wait = wait if on else self.wait  # type: ignore[assignment,method-assign]

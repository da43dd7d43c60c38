"""Output of rank 0: a line per logged step and save, a bar on a terminal, a table at the end."""

import os
import time
from collections import deque
from pathlib import Path

from data_prep import terminal
from data_prep.columns import aligned
from data_prep.progress import Meter, clock

LOADED = time.monotonic()  # when this module was
RECENT = 50  # steps whose mean duration gives the time left, so that a slow start is soon forgotten


class Console:
    """`step` is the step that the run begins or resumes at, `steps` the last one of its schedule."""

    def __init__(self, step: int, steps: int) -> None:
        self.steps, self._first_step = steps, step
        self._started = time.monotonic()
        self._edges: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)  # steps and when each was done
        self._meter = Meter("train", steps)
        self._step, self._rate = step, ""
        self.busy("first step")

    def stepped(self, step: int, tokens_per_s: float) -> None:
        """Moves the bar. After the first step prints the time that it took to get there."""
        if not self._edges:
            say(f"first step: done {since_process_start():.1f} s after this rank started")
        self._edges.append((step, time.monotonic()))
        self._step, self._rate = step, f"{tokens_per_s:,.0f} tokens/s"
        self.busy()

    def rewind(self, step: int) -> None:
        """Continues after an earlier step."""
        self._edges = deque([(step, time.monotonic())], maxlen=RECENT + 1)
        self._step = step

    def busy(self, doing: str = "", at_once: bool = False) -> None:
        """Draws the bar on a terminal. doing: the work between two steps, such as an evaluation."""
        if terminal.status_columns():
            left = f"{self.left(self._step)} left" if self._edges else ""
            facts = [f"{self._step:,}/{self.steps:,}", left, doing or self._rate]
            self._meter.show(self._step, list(filter(None, facts)), at_once)

    def left(self, step: int) -> str:
        """Formats the time to the last step of the schedule, by the mean of the last steps, evaluations included."""
        (first, start), (last, end) = (self._edges[0], self._edges[-1]) if self._edges else [(step, 0.0)] * 2
        if last == first:  # one step so far: its own time, and that of the start
            first, start, last, end = self._first_step, self._started, step, time.monotonic()
        return clock((end - start) / max(1, last - first) * (self.steps - step))

    def logged(self, step: int, scalars: dict[str, float]) -> None:
        """Prints one line. The bar below it is of the same step."""
        self.busy(at_once=True)
        parts = [terminal.in_colour(f"step {step:>{len(str(self.steps))}}/{self.steps}", "bold")]
        parts += [form.format(scalars[name]) for name, form in FORMS.items() if name in scalars]
        parts += [parts_of_step(scalars)] if "step_s/forward" in scalars else []
        say("  ".join([*parts, *([f"{self.left(step)} left"] if self._edges else [])]))

    def saved(self, folder: Path, seconds: float) -> None:
        """Prints one line."""
        say(f"saved: {folder} in {seconds:.1f} s")

    def close(self) -> None:
        """Removes the bar."""
        self._meter.__exit__(None, None, None)


class Summary:
    """Best and last values of a run, for the table at its end. Fed with the lines of its metrics."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.best: dict[str, tuple[float, float]] = {}  # value and step

    def add(self, scalars: dict[str, float]) -> None:
        """Takes one logged step."""
        self.last |= scalars
        for name in RESULTS.keys() & scalars.keys():
            self.best[name] = min(self.best.get(name, (float("inf"), 0.0)), (scalars[name], scalars["step"]))

    def table(self, steps: int, started_at: int, step: int, tokens: int, seconds: float, checkpoints: list[str]) -> str:
        """Formats the table of a run of `steps` that has done `step` of them, with `tokens`. This start began at step
        `started_at` and took `seconds`.
        """
        last = self.last
        here = f", {step - started_at:,} of them in this start" if started_at else ""
        rows = [["steps", f"{step:,} of {steps:,}{here}"], ["tokens", f"{tokens:,}"]]
        for name, (title, form) in RESULTS.items():
            if name in self.best:
                best, at = self.best[name]
                rows.append([title, f"{form.format(last[name])} (best {form.format(best)} at step {at:,.0f})"])
        rows.append(["time", f"{clock(seconds)}{' in this start' if started_at else ''}"])
        measured = last if step > started_at else {}  # else an earlier start's
        speed = [form.format(measured[name]) for name, form in SPEED.items() if name in measured]
        if speed:
            rows.append(["speed", f"{', '.join(speed)}, at the end"])
        if "peak_memory_gib" in measured:
            rows.append(["peak memory", f"{measured['peak_memory_gib']:.2f} GiB, of the rank that holds most"])
        newest = f", the newest is {checkpoints[-1]}" if checkpoints else ""
        rows.append(["checkpoints", f"{len(checkpoints)}{newest}"])
        return "\n".join(aligned(rows, left=(0, 1)))


def parts_of_step(scalars: dict[str, float]) -> str:
    """Formats the share of each part of the step that is at least 1 %, as in `fwd 22% head 31% bwd 40% opt 5%`."""
    seconds = {name: scalars[f"step_s/{part}"] for part, name in PARTS.items()}
    shares = {name: value / (sum(seconds.values()) or 1.0) for name, value in seconds.items()}
    return " ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.01)


def say(line: str) -> None:
    """Prints the line in one write, so that text of other processes cannot come between."""
    print(f"{line}\n", end="", flush=True)


def since_process_start() -> float:
    """Seconds since this process was started, its imports included; without them if the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.monotonic() - LOADED


FORMS = {
    "loss": "loss {:.4f}",
    "val_loss": "val loss {:.4f}",
    "val_bits_per_byte": "val bits/byte {:.4f}",
    "val_loss_ema": "ema val loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "norm {:.3f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gib": "memory {:.2f} GiB",
}
PARTS = {
    "data": "data",
    "forward": "fwd",
    "head": "head",
    "backward": "bwd",
    "optimizer": "opt",
    "hooks": "hooks",
}
SPEED = {"tokens_per_s": "{:,.0f} tokens/s", "tokens_per_s_per_rank": "{:,.0f} per rank", "mfu": "MFU {:.1%}"}
RESULTS = {
    "loss": ("loss", "{:.4f}"),
    "val_loss": ("val loss", "{:.4f}"),
    "val_bits_per_byte": ("val bits/byte", "{:.4f}"),
}

"""Traces of some steps: torch.profiler's, and on a GPU a snapshot of its memory."""

import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..config.job import JobConfig
from ..profile import SUFFIX, trace_folder
from ..timeline import DATA, Timeline
from .base import Hook, Run, StepReport, TrainerView

MEMORY_EVENTS = 200_000  # allocations and frees that a snapshot remembers


class ProfileHook(Hook):
    """Traces the steps from `first` to `last`, labelled by step and part. A start that begins or stops between the two
    traces the steps that it does. No collectives.
    """

    def __init__(self, first: int, last: int, folder: Path, rank: int) -> None:
        self.first, self.last, self.folder, self.rank = first, last, folder, rank
        self._trace: Trace | None = None

    def before_training(self, trainer: TrainerView) -> None:
        if trainer.state.step >= self.last:
            print(f"profile: steps {self.first} to {self.last} were done before this start: no trace", flush=True)
        self._start(trainer)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if self._trace is not None:
            self._trace.done = report.step
        if report.step == self.last:
            self.end()
        else:
            self._start(trainer)

    def _start(self, trainer: TrainerView) -> None:
        """Starts the trace if the next step belongs to it. Not within that step, whose time it would take."""
        step = trainer.state.step + 1
        if self._trace is None and self.first <= step <= self.last:
            self._trace = Trace(trainer.model.timeline, step, trainer.mesh.device)

    def end(self) -> None:
        """Ends the trace and writes it, if there is one. A trace that cannot be written is only a warning."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        with closing(trace):
            if trace.done < trace.first:
                return  # an error or a stop within the first step
            try:
                paths = trace.write(self.folder, self.rank)
            except (OSError, RuntimeError) as error:
                print(f"warning: no trace of steps {trace.first} to {trace.done}: {error}", file=sys.stderr, flush=True)
                return
        run = self.folder.parent
        print(f"profile: {', '.join(map(str, paths))}; python -m pretrain.profile run={run}", flush=True)


class Trace:
    """A running trace of this process. Close it: a profiler that still runs at the end crashes Python."""

    def __init__(self, timeline: Timeline, step: int, device: torch.device) -> None:
        self.first, self.done = step, step - 1
        self._timeline, self._on_gpu = timeline, device.type == "cuda"
        self._labels = ExitStack()  # of the step and its part
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()
        self._running = True
        timeline.watchers.insert(0, self._mark)  # before those that take the time

    def _mark(self, part: str) -> None:
        """Labels the part that begins, inside of a label of its step, as TensorBoard's plugin knows it."""
        if part == DATA:
            self._labels.close()
            self._labels.enter_context(record_function(f"ProfilerStep#{self.done + 1}"))
            self._part = self._labels.enter_context(ExitStack())
        self._part.close()
        self._part.enter_context(record_function(part))

    def write(self, folder: Path, rank: int) -> list[Path]:
        """Stops, and writes the trace, and on a GPU the snapshot. Returns their paths."""
        self._stop()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self.first}-{self.done}.rank-{rank}"
        paths = [folder / f"{name}{SUFFIX}"]
        unfinished = folder / f"unfinished-{rank}.json.gz"
        try:
            self._profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(paths[0])
        finally:
            unfinished.unlink(missing_ok=True)
        if self._on_gpu:
            paths.append(folder / f"{name}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(paths[-1]))
        return paths

    def _stop(self) -> None:
        if self._running:
            self._running = False
            self._timeline.watchers.remove(self._mark)
            self._labels.close()
            self._profiler.stop()

    def close(self) -> None:
        with suppress(RuntimeError):  # a failed GPU has an error of its own
            self._stop()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)


def build(config: JobConfig, run: Run) -> ProfileHook | None:
    """The hook, on the ranks that write a trace."""
    rank = run.parts.mesh.rank
    if not config.profile.steps or rank not in config.profile.ranks:
        return None
    first, last = config.profile.steps
    hook = ProfileHook(first, last, trace_folder(config.run_dir), rank)
    run.ends.append(hook.end)
    return hook

"""Runs tasks in processes, one per core. Tasks go to the workers, records come back; text does not.

    parent   hands out tasks, reads each worker's watch, yields records
      └ worker   runs a task; its watch, in shared memory, shows the current document

If a document crashes the worker (native code) or makes it hang, the unit runs again one document at a time, and the
document is quarantined. If a worker is killed from outside, or waits too long for the corpus, the run stops with one
line, because no document is at fault.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, parent_process
from typing import Any

from data_prep import fork_server
from data_prep.drop import DropCopies
from data_prep.encode import READING, EncodeJob, EncodeUnit, UnitRecord
from data_prep.encoder import Encoder
from data_prep.errors import DataError

Task = EncodeUnit | DropCopies
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
TICK = 0.5  # seconds between two checks of the workers
LONGEST_TICK = 5.0  # seconds that one tick may count: longer, and the parent itself was stopped
READING_SECONDS = 600.0  # seconds within which the corpus must deliver something
END_SECONDS = 10.0  # seconds to wait for a killed worker: it may hang in a file system that does not answer
PLACE, BEATS, BYTES, TOKENS = range(4)


class SharedWatch:
    """The worker's side of a watch: four numbers in shared memory."""

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers

    def at(self, document: int) -> None:
        self._numbers[PLACE] = document
        self._numbers[BEATS] += 1

    def done(self, text_bytes: int, tokens: int) -> None:
        self._numbers[BYTES], self._numbers[TOKENS] = text_bytes, tokens


class Clock:
    """Counts the seconds during which this process checked its workers. A long pause (Ctrl-Z) counts LONGEST_TICK."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._last, LONGEST_TICK)
        self._last = now


class WorkerProcess:
    """The parent's side of a worker, with its task."""

    def __init__(self, context: Any, job: EncodeJob, clock: Clock) -> None:
        self._clock = clock
        self.numbers = context.RawArray("q", 4)
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.numbers, job), daemon=True)
        fork_server.start()
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self._beats, self._since = 0, clock.seconds

    def give(self, task: Task) -> None:
        self.task = task
        self.numbers[PLACE], self.numbers[BYTES], self.numbers[TOKENS] = READING, 0, 0
        self._since = self._clock.seconds
        with suppress(BrokenPipeError):  # it has died: the parent sees that when it waits for the answer
            self.link.send(task)

    @property
    def reads(self) -> bool:
        return bool(self.numbers[PLACE] == READING)

    def stands_still(self, patience: float) -> str:
        """The message for a worker that hangs: more than `patience` seconds at one document, or too long reading."""
        if self.numbers[BEATS] != self._beats:
            self._beats, self._since = self.numbers[BEATS], self._clock.seconds
        seconds = READING_SECONDS if self.reads else patience
        waited = self._clock.seconds - self._since
        still = self.task is not None and self._beats > 0 and waited > seconds  # 0 beats: it is still starting
        return f"{'nothing came for' if self.reads else 'no end after'} {seconds:g} s" if still else ""

    def end(self) -> None:
        self.process.kill()
        self.process.join(END_SECONDS)
        self.link.close()


class Pool:
    """A pool of at most `workers` processes, started when there is work; a context manager, which ends them."""

    def __init__(self, workers: int, job: EncodeJob, patience: float) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._most, self._job, self._patience = workers, job, patience
        self._workers: list[WorkerProcess] = []
        self._clock = Clock()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()

    def running(self) -> tuple[int, int]:
        """Bytes of text and tokens that the unfinished units have done."""
        return sum(w.numbers[BYTES] for w in self._workers), sum(w.numbers[TOKENS] for w in self._workers)

    def run(self, tasks: Iterable[Task], tick: Callable[[], None]) -> Iterator[UnitRecord]:
        """Yields the tasks' records as they finish. Takes one task more than it has workers.

        Raises DataError if a worker is killed or the corpus cannot be read, OSError if it cannot write. Finished units
        stay, and the next run uses them.
        """
        waiting = iter(tasks)
        task = next(waiting, None)
        while task is not None or any(worker.task for worker in self._workers):
            while task is not None and (worker := self._idle()):
                worker.give(task)
                task = next(waiting, None)
            links = {worker.link: worker for worker in self._workers if worker.task}
            for link in connection.wait(list(links), timeout=TICK):
                assert isinstance(link, connection.Connection)
                if record := self._answer(links[link]):
                    yield record
            self._clock.tick()
            for worker in list(self._workers):
                if reason := worker.stands_still(self._patience):
                    self._put_aside(worker, reason)
            tick()

    def _idle(self) -> WorkerProcess | None:
        for worker in self._workers:
            if worker.task is None:
                return worker
        if len(self._workers) < self._most:
            self._workers.append(WorkerProcess(self._context, self._job, self._clock))
            return self._workers[-1]
        return None

    def _answer(self, worker: WorkerProcess) -> UnitRecord | None:
        """The record of the worker's task; None if it crashed and starts again."""
        try:
            answer = worker.link.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode
            if code is not None and -code in CRASHES:
                who = "the reader" if worker.reads else "the tokenizer"
                self._put_aside(worker, f"{who} ended its process ({signal.Signals(-code).name})")
                return None
            raise DataError(
                "a worker process was killed (perhaps out of memory: lower workers= or max_document_mib=);"
                " finished units are kept, the same command continues"
            ) from None
        worker.task = None
        worker.numbers[BYTES] = worker.numbers[TOKENS] = 0
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, UnitRecord)
        return answer

    def _put_aside(self, worker: WorkerProcess, reason: str) -> None:
        """Starts a new worker on the same unit: one document at a time, or without the document at fault."""
        task, place = worker.task, worker.numbers[PLACE]
        worker.end()
        assert task is not None
        if not isinstance(task, EncodeUnit) or place == READING or place in task.rejected:
            raise DataError(f"{task.unit}: {reason}; finished units are kept, the same command continues")
        fresh = self._workers[self._workers.index(worker)] = WorkerProcess(self._context, self._job, self._clock)
        rejected = {**task.rejected, place: reason} if task.one_at_a_time else task.rejected
        fresh.give(replace(task, one_at_a_time=True, rejected=rejected))


def work(link: connection.Connection, numbers: Any, job: EncodeJob) -> None:
    """Runs a worker process: loads the tokenizer, runs tasks, and ends with its parent."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    watch = SharedWatch(numbers)
    try:
        encoder = Encoder.load(job.folder, job.gigatoken)
    except (DataError, OSError) as error:
        link.send(error)
        return
    while True:
        task: Task = link.recv()
        try:
            link.send(task.run(job, encoder, watch))
        except (DataError, OSError) as error:
            link.send(error)


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])  # otherwise the workers of a killed parent would never end
    os._exit(1)

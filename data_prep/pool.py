"""Tasks in processes: one a core, each told what to do and answering with what it has done; no text comes back.

    parent   hands out tasks, looks at each worker's watch, yields records
      └ worker   runs a task; its watch, in shared memory, says at which document it is

A document that ends the worker's process (a crash of native code), or on which it stands still, is found by doing
the unit again a document at a time, and is put aside. A worker that is killed from outside ends the run in one line,
and so does one that waits for the corpus too long: that is no document's fault.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, parent_process, resource_tracker
from typing import Any

from data_prep.drop import DropCopies
from data_prep.encode import READING, EncodeJob, EncodeUnit, UnitRecord
from data_prep.encoder import Encoder
from data_prep.errors import DataError

Task = EncodeUnit | DropCopies
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}
TICK = 0.5  # seconds between looks
LONGEST_TICK = 5.0  # seconds: between two looks of a process that runs
READING_SECONDS = 600.0  # in which something must come from the corpus
END_SECONDS = 10.0  # for a killed worker to be gone: while a file system does not answer, it cannot
PLACE, BEATS, BYTES, TOKENS = range(4)


class SharedWatch:
    """The worker's side: four numbers in shared memory."""

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers

    def at(self, document: int) -> None:
        self._numbers[PLACE] = document
        self._numbers[BEATS] += 1

    def done(self, text_bytes: int, tokens: int) -> None:
        self._numbers[BYTES], self._numbers[TOKENS] = text_bytes, tokens


class Clock:
    """Seconds in which this process has looked at its workers. A longer pause (Ctrl-Z) counts as LONGEST_TICK."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._last, LONGEST_TICK)
        self._last = now


class WorkerProcess:
    """The parent's side of a worker, and its task."""

    def __init__(self, context: Any, job: EncodeJob, clock: Clock) -> None:
        self._clock = clock
        self.numbers = context.RawArray("q", 4)
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.numbers, job), daemon=True)
        resource_tracker.ensure_running()  # else started by the worker's start, which lets the signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # in the worker, too: for the parent alone
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.task: Task | None = None
        self._beats, self._since = 0, clock.seconds

    def give(self, task: Task) -> None:
        self.task = task
        self.numbers[PLACE], self.numbers[BYTES], self.numbers[TOKENS] = READING, 0, 0
        self._since = self._clock.seconds
        with suppress(BrokenPipeError):  # it has died: whoever waits for its answer sees that
            self.link.send(task)

    @property
    def reads(self) -> bool:
        return bool(self.numbers[PLACE] == READING)

    def stands_still(self, patience: float) -> str:
        """Says that it has been at one document for over `patience` seconds, or reading for too long; "" if not."""
        if self.numbers[BEATS] != self._beats:
            self._beats, self._since = self.numbers[BEATS], self._clock.seconds
        seconds = READING_SECONDS if self.reads else patience
        waited = self._clock.seconds - self._since
        still = self.task is not None and self._beats > 0 and waited > seconds  # 0 beats: it starts
        return f"{'nothing came for' if self.reads else 'no end after'} {seconds:g} s" if still else ""

    def end(self) -> None:
        self.process.kill()
        self.process.join(END_SECONDS)
        self.link.close()


class Pool:
    """`workers` processes at most, started when there is something to do; a context manager that ends them."""

    def __init__(self, workers: int, job: EncodeJob, patience: float) -> None:
        self._context = multiprocessing.get_context("spawn")  # threads of tokenizers and Arrow do not survive a fork
        self._most, self._job, self._patience = workers, job, patience
        self._workers: list[WorkerProcess] = []
        self._clock = Clock()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()

    def running(self) -> tuple[int, int]:
        """Bytes of text and tokens of the units that are not finished yet."""
        return sum(w.numbers[BYTES] for w in self._workers), sum(w.numbers[TOKENS] for w in self._workers)

    def run(self, tasks: Iterable[Task], tick: Callable[[], None]) -> Iterator[UnitRecord]:
        """The tasks' records, in the order in which they are done. Takes one task more than it has workers.

        Raises DataError if a worker is killed or the corpus cannot be read, OSError if it cannot write: what is
        finished stays, and the next run takes it over.
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
        """The record of its task; None where it has crashed, and begins again."""
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
                "a worker process died (killed, perhaps out of memory: fewer workers= or a smaller max_document_mib="
                " need less); finished units are kept, and the same command does the rest"
            ) from None
        worker.task = None
        worker.numbers[BYTES] = worker.numbers[TOKENS] = 0
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, UnitRecord)
        return answer

    def _put_aside(self, worker: WorkerProcess, reason: str) -> None:
        """A new worker in its place: the same unit, a document at a time, or without the one that did this."""
        task, place = worker.task, worker.numbers[PLACE]
        worker.end()
        assert task is not None
        if not isinstance(task, EncodeUnit) or place == READING or place in task.poison:
            raise DataError(f"{task.unit}: {reason}; finished units are kept, and the same command does the rest")
        fresh = self._workers[self._workers.index(worker)] = WorkerProcess(self._context, self._job, self._clock)
        poison = {**task.poison, place: reason} if task.one_at_a_time else task.poison
        fresh.give(replace(task, one_at_a_time=True, poison=poison))


def work(link: connection.Connection, numbers: Any, job: EncodeJob) -> None:
    """A worker: loads the tokenizer, and dies with its parent."""
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
    connection.wait([sentinel])  # else the workers of a killed parent would work on, or wait for work, for ever
    os._exit(1)

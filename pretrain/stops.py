"""Reasons to stop a run before its end, and the signals and deadlines behind them. Imports no torch, for launchers."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
MEETING_SECONDS = 30.0  # if the signal came before the rank could meet the others: they may still arrive


class StopReason(IntEnum):
    """Why all ranks stop. Of several reasons the highest counts."""

    NONE = 0
    TIME_LIMIT = 1  # train.time_limit is reached: this launch is complete
    REQUESTED = 2  # a signal, or the job's deadline is near; meant to be resumed
    UNSAVED = 3  # a save in the background has failed


StopCheck = tuple[
    StopReason, Callable[[], bool]
]  # called by each rank after each step; True: there is this reason to stop


class StopRequests:
    """Counts the signals that ask to save and stop, while the context lasts. It only counts: a collective in a handler
    would deadlock. A launcher may have blocked the signals; then one sent before the context counts as well. SIGHUP
    stays ignored if it was, as under nohup.

    after: handler of the signals after the context; None: the one from before.
    """

    def __init__(self, after: signal.Handlers | None = None) -> None:
        self.count, self.after = 0, after

    def asked(self) -> bool:
        return self.count > 0

    def sleep(self, seconds: float) -> None:
        """Sleeps, but returns at the first request."""
        until = time.monotonic() + seconds
        while not self.count and time.monotonic() < until:
            time.sleep(0.05)

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Calls `end` in a thread on a request, while the context lasts: the main thread may wait in C++, where no
        handler runs. A request from before the context counts after MEETING_SECONDS.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write)
        seconds = MEETING_SECONDS if self.count else None

        def wait() -> None:
            while select.select([read], [], [], seconds)[0]:
                numbers = os.read(read, 1)  # a signal's number; empty: the context has ended
                if not numbers or numbers[0] in STOP_SIGNALS:
                    break
            else:
                numbers = b"late"
            if numbers:
                end()

        thread = threading.Thread(target=wait, name="requests", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(write)
            thread.join()
            os.close(read)

    def __enter__(self) -> "StopRequests":
        heard = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if self.after is None else self.after)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Deadline:
    """Returns True once fewer than max(reserve, 1.5 * (longest step + 2 * longest save)) seconds remain before `at`.

    `at` is a unix time. A save may have to wait for the one before, so it counts twice.
    """

    def __init__(self, at: float, reserve: float, longest_save: Callable[[], float]) -> None:
        self.at, self.reserve, self.longest_save = at, reserve, longest_save
        self._edge, self._longest_step = time.monotonic(), 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        self._edge, self._longest_step = now, max(self._longest_step, now - self._edge)
        return time.time() + max(self.reserve, 1.5 * (self._longest_step + 2 * self.longest_save())) >= self.at

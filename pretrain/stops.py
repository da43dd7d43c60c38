"""Why a run stops before its end, and who says so. Imports no torch: the launcher has the same signals."""

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
MEETING_SECONDS = 30.0  # for a rank that was asked before it came to the meeting place: the others may be on the way


class StopReason(IntEnum):
    """Why all ranks stop; of several, the highest counts."""

    NONE = 0
    TIME_LIMIT = 1  # train.time_limit: this launch is where it was meant to get
    REQUESTED = 2  # a signal, or the end of the job is near: to be gone on with
    UNSAVED = 3  # a save in the background has failed


StopCheck = tuple[StopReason, Callable[[], bool]]  # asked by each rank at each step edge: whether there is that reason


class StopRequests:
    """Counts the signals that ask to save and stop, while the context lasts. No more than that: a collective in a
    handler deadlocks. A launcher may have blocked the signals: one that came before the context counts. SIGHUP stays
    ignored if it was, as under nohup.

    after: what the signals do once the context has ended; None: what they did before.
    """

    def __init__(self, after: signal.Handlers | None = None) -> None:
        self.count, self.after = 0, after

    def asked(self) -> bool:
        return self.count > 0

    def sleep(self, seconds: float) -> None:
        """Not so long if there is a request."""
        until = time.monotonic() + seconds
        while not self.count and time.monotonic() < until:
            time.sleep(0.05)

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Within it a request calls `end`, in a thread: the main one may wait in C++, where no handler runs. One from
        before does so after MEETING_SECONDS.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write)
        seconds = MEETING_SECONDS if self.count else None

        def wait() -> None:
            while select.select([read], [], [], seconds)[0]:
                numbers = os.read(read, 1)  # of a signal; none: the context has ended
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
    """Says to stop as long before `at`, a unix time, as it takes: for a step and a save that has to wait for another.

    Of both it takes the longest so far, and half as much again; but never less than `reserve` seconds.
    """

    def __init__(self, at: float, reserve: float, longest_save: Callable[[], float]) -> None:
        self.at, self.reserve, self.longest_save = at, reserve, longest_save
        self._edge, self._longest_step = time.monotonic(), 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        self._edge, self._longest_step = now, max(self._longest_step, now - self._edge)
        return time.time() + max(self.reserve, 1.5 * (self._longest_step + 2 * self.longest_save())) >= self.at

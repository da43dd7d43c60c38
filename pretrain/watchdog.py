"""Ends a rank that hangs."""

import faulthandler
import signal
import threading
import time

PAUSE_SECONDS = 5.0  # the SIGSTOP of a launcher, or of `scontrol suspend`, follows SIGTSTP within this time


class Watchdog:
    """Ends this rank if `alive` is not called for `seconds`, with the stacks of all its threads on stderr.

    It uses the kernel's timer and faulthandler's handler, which need no Python, so it works if the interpreter hangs.
    A launcher can cause the same with SIGALRM. The timer keeps running while the process is stopped. So a launcher
    sends SIGTSTP, which it blocks in its ranks, before it stops them: that resets the timer.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock, self._armed, self._paused, self._over = threading.Lock(), False, False, False
        self._thread = threading.Thread(target=self._watch_pauses, name="pauses", daemon=True)

    def __enter__(self) -> "Watchdog":
        faulthandler.register(
            signal.SIGALRM, file=2, all_threads=True, chain=True
        )  # then SIGALRM's default action: the process dies
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, signal.SIGTSTP)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)

    def alive(self) -> None:
        """(Re)arms the timer. With seconds=0 the watchdog is off."""
        with self._lock:
            self._armed = True
            self._set()

    def _set(self) -> None:
        running = self._armed and not self._paused and not self._over
        signal.setitimer(signal.ITIMER_REAL, self.seconds if running else 0)

    def _watch_pauses(self) -> None:
        """Runs in a thread, because Python runs no handler while the main thread waits in a collective."""
        while True:
            signal.sigwait([signal.SIGTSTP])
            if self._over:
                return
            for paused in (True, False):
                with self._lock:
                    self._paused = paused
                    self._set()
                time.sleep(PAUSE_SECONDS * paused)  # after a longer pause this time has already passed

"""Ends a rank that hangs."""

import faulthandler
import signal
import threading
import time

PAUSE_SECONDS = 5.0  # after SIGTSTP: within them comes the SIGSTOP of a launcher, or of `scontrol suspend`


class Watchdog:
    """Ends this rank `seconds` after it was last said to be alive, with the stacks of all its threads on stderr.

    The kernel's timer and faulthandler's handler do it, which need no Python: it works where the interpreter hangs.
    A launcher that sends SIGALRM has the same. The timer would run on while the process is stopped: SIGTSTP, which a
    launcher blocks in its ranks and sends before it stops them, sets it back.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock, self._armed, self._paused, self._over = threading.Lock(), False, False, False
        self._thread = threading.Thread(target=self._watch_pauses, name="pauses", daemon=True)

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)  # then it does what it always does
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, signal.SIGTSTP)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)

    def alive(self) -> None:
        """From the first call on, and until the next one, it watches; 0 seconds are for ever."""
        with self._lock:
            self._armed = True
            self._set()

    def _set(self) -> None:
        running = self._armed and not self._paused and not self._over
        signal.setitimer(signal.ITIMER_REAL, self.seconds if running else 0)

    def _watch_pauses(self) -> None:
        """Runs in a thread: the main one may wait in a collective, where Python runs no handler."""
        while True:
            signal.sigwait([signal.SIGTSTP])
            if self._over:
                return
            for paused in (True, False):
                with self._lock:
                    self._paused = paused
                    self._set()
                time.sleep(PAUSE_SECONDS * paused)  # over at once when a longer pause ends

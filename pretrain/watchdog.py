"""Ends a rank that hangs."""

import faulthandler
import signal


class Watchdog:
    """Ends this rank `seconds` after it was last said to be alive, with the stacks of all its threads on stderr.

    The kernel's timer and faulthandler's handler do it, which need no Python: it works where the interpreter hangs.
    A launcher that sends SIGALRM has the same.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> "Watchdog":
        faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)  # then it does what it always does
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)

    def alive(self) -> None:
        """From the first call on, and until the next one, it watches; 0 seconds are for ever."""
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

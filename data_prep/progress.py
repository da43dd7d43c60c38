"""How far a run is, and how fast: a line that renews itself on a terminal, a line a minute in a log."""

import sys
import time
from types import TracebackType

LOG_SECONDS = 60.0
TERMINAL_SECONDS = 0.5


class Progress:
    """On stderr. `total`: bytes of text, about; None where nobody knows. A context manager that clears its line."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._terminal = sys.stderr.isatty()
        self._every = TERMINAL_SECONDS if self._terminal else LOG_SECONDS
        self._start = self._shown = time.monotonic()
        self._done = self._text_bytes = self._tokens = 0

    def __enter__(self) -> "Progress":
        return self

    def there(self, size: int) -> None:
        """A unit from an earlier run."""
        if self._total is not None:
            self._total -= size

    def add(self, size: int, text_bytes: int, tokens: int) -> None:
        """A unit is done. `size`: its share of the total."""
        self._done += size
        self._text_bytes += text_bytes
        self._tokens += tokens

    def show(self, running_bytes: int, running_tokens: int) -> None:
        """Say it, if it is time to. What is running is not in `add` yet."""
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        line = self.line(now - self._start, running_bytes, running_tokens)
        print(
            f"\r\x1b[K{line}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def line(self, seconds: float, running_bytes: int, running_tokens: int) -> str:
        text_bytes, tokens = self._text_bytes + running_bytes, self._tokens + running_tokens
        rate = f"{text_bytes / 1e6 / seconds:.1f} MB/s, {tokens / 1e6 / seconds:.2f}M tokens/s"
        done = f"{text_bytes / 1e6:,.0f} MB of text, {tokens / 1e6:,.1f}M tokens"
        if not self._total:
            return f"tokenise: {done}, {rate}"
        share = min((self._done + running_bytes) / self._total, 1.0)
        left = "" if share == 0 else f", {clock(seconds * (1 - share) / share)} left"
        return f"tokenise: {share:.0%}, {done}, {rate}{left}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Formats seconds as 0:00:00."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

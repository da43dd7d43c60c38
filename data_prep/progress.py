"""How far a command is, and how fast: a bar on a terminal, a line a minute in a log.

`Meter` counts anything; `Progress` is the tokeniser's. tqdm draws the bar. What tqdm does besides is left out: it
knows nothing of other processes on the same terminal, nor of a terminal that is gone; data_prep/terminal.py does.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

from data_prep import terminal

LOG_SECONDS = 60.0
TERMINAL_SECONDS = 0.1
TICK_SECONDS = 0.5
SHORTEST_BAR, LONGEST_BAR = 10, 40  # characters

T = TypeVar("T")


class Meter:
    """Shows `title` and how much of `total` is done; None: unknown. A context manager, which removes its bar."""

    def __init__(self, title: str, total: float | None) -> None:
        self.title, self.total = title, total
        self._start = time.monotonic()
        self._shown = self._start if terminal.status_columns() == 0 else float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        terminal.status("")

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def show(self, done: float, facts: Sequence[str], at_once: bool = False) -> None:
        """Draws the bar, or writes a line on stderr, if the last one is old enough. facts: the most important first.

        at_once: even if it is not.
        """
        now, columns = time.monotonic(), terminal.status_columns()
        if not at_once and now - self._shown < (TERMINAL_SECONDS if columns else LOG_SECONDS):
            return
        self._shown = now
        if columns:
            terminal.status(bar(self.title, done, self.total, facts, columns))
        elif terminal.first_rank():
            share = [f"{_share(done, self.total):.0%}"] if self.total else []
            print(f"{self.title}: {', '.join([*share, *facts])}", file=sys.stderr, flush=True)

    def left(self, done: float) -> list[str]:
        """The time left, as a fact; none if it is unknown."""
        if not self.total or done <= 0:
            return []
        share = _share(done, self.total)
        return [f"{clock(self.seconds * (1 - share) / share)} left"]


class Progress:
    """Progress of the tokeniser. `total`: bytes of text, about; None if unknown. A context manager, as Meter."""

    def __init__(self, total: int | None) -> None:
        self._meter = Meter("tokenise", total)
        self._done = self._text_bytes = self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.__exit__(kind, error, trace)

    def there(self, size: int) -> None:
        """Leaves out a unit from an earlier run."""
        if self._meter.total is not None:
            self._meter.total -= size

    def add(self, size: int, text_bytes: int, tokens: int) -> None:
        """Counts a finished unit. `size`: its share of the total."""
        self._done += size
        self._text_bytes += text_bytes
        self._tokens += tokens

    def show(self, running_bytes: int, running_tokens: int) -> None:
        """Shows where the run is, if it is time to. What is running is not in `add` yet."""
        done = self._done + running_bytes
        text_bytes, tokens = self._text_bytes + running_bytes, self._tokens + running_tokens
        seconds = max(self._meter.seconds, 1e-9)
        counted = [f"{text_bytes / 1e6:,.0f} MB of text", f"{tokens / 1e6:,.1f}M tokens"]
        rates = [f"{text_bytes / 1e6 / seconds:.1f} MB/s", f"{tokens / 1e6 / seconds:.2f}M tokens/s"]
        self._meter.show(done, [*counted, *rates, *self._meter.left(done)])


def progress(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, and shows how many are done."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with Meter(title, total) as meter:
        for done, item in enumerate(items):
            meter.show(done, [f"{done:,} of {total:,}" if total else f"{done:,}", *meter.left(done)])
            yield item


@contextmanager
def working(title: str) -> Iterator[None]:
    """Shows the title and the time since, on a terminal, while the context lasts: for work that cannot be counted."""
    over = threading.Event()

    def tick() -> None:
        with Meter(title, None) as meter:
            while not over.wait(TICK_SECONDS):
                meter.show(0, [clock(meter.seconds)])

    if not terminal.status_columns():
        yield
        return
    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def bar(title: str, done: float, total: float | None, facts: Sequence[str], columns: int) -> str:
    """Draws one line of at most that many characters: title, share, bar, facts. A narrow window leaves out the last
    facts, then the bar.
    """
    facts = list(facts)
    if not total:
        return f"{title}: {', '.join(facts)}"[:columns]
    share = _share(done, total)
    begin = f"{title} {share:4.0%} "
    while len(facts) > 1 and len(begin) + SHORTEST_BAR + len(_after(facts)) > columns:
        facts.pop()
    after = _after(facts)
    width = min(columns - len(begin) - len(after), LONGEST_BAR)
    if width < SHORTEST_BAR:
        return f"{begin}{after}"[:columns].rstrip()
    from tqdm import tqdm  # only a terminal pays for it

    drawn = tqdm.format_meter(share, 1, 0, ncols=width, ascii=terminal.plain_ascii(), bar_format="{bar}")
    return begin + terminal.in_colour(drawn, "green", in_status=True) + after


def _after(facts: Sequence[str]) -> str:
    return " " + ", ".join(facts) if facts else ""


def _share(done: float, total: float) -> float:
    return min(done / total, 1.0)


def clock(seconds: float) -> str:
    """Formats seconds as 0:00:00."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"

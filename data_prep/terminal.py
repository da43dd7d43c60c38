"""Makes standard output, standard error and Ctrl-C safe for every command. Work continues if output cannot be written.
Ctrl-C while a command loads prints one line. A separate module, because it must be imported before heavy ones.

It also draws the status line, the last line of a terminal, in which progress.py shows its bar. Several processes may
write to one terminal, one at a time: a terminal whose reader is slow takes only a part of a text at once. Each text
erases the status line first, and ends at the start of a line. So text and bar never mix, and no process has to know of
another.
"""

import atexit
import errno
import fcntl
import io
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, TextIO

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells count
PATIENCE = 10.0  # seconds to wait for a reader that has stopped reading: a pager, or a terminal after Ctrl-S
PIECE = 4096  # bytes that a pipe takes without blocking, if it takes any
GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)  # the reader has ended, or the terminal is closed
OWN_PACKAGES = ("data_prep", "pretrain", "launch")
ERASE = b"\r\x1b[K"  # the cursor to the start of its line, and nothing behind it
COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1}  # codes of the terminal
FAULT = re.compile(rb"^((error)|warning)\b[^:\n]*:", re.MULTILINE)  # how lines about a fault begin
COLUMNS = 80  # of a terminal that does not say how wide it is
INSTALL = "run `make setup`, then `source .venv/bin/activate`; see docs/install.md"


class Output(io.RawIOBase):
    """A file descriptor to which writing never fails: text that cannot be written, or is not read, is dropped.

    product: the text is the command's result, so writing waits for the reader and raises the first failure.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name, self.mode, self.product = name, "w", False
        self._descriptor, self._patience, self._turn = descriptor, PATIENCE, PATIENCE
        self.draws = self.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.coloured = self.draws and not os.environ.get("NO_COLOR")  # https://no-color.org
        self.within_line = False  # the last text did not end its line
        self._target = _without_waiting(descriptor) if self.isatty() else descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Accepts all bytes. Raises BrokenPipeError or OSError only for a product, and only once."""
        size = len(memoryview(data).cast("B"))
        if not size:  # as by print(…, end="") if Python is unbuffered
            return 0
        left = memoryview(self._framed(bytes(data)) if self.draws else data).cast("B")
        try:
            with self._alone(self._turn) as alone:
                self._turn = PATIENCE if alone else 0.0  # a stopped process may keep the terminal for good
                while left and self._takes_more():
                    with suppress(BlockingIOError):  # a terminal that had room for less
                        left = left[os.write(self._target, left[:PIECE]) :]
        except OSError as error:
            if self.product:
                self.product = False
                if error.errno in GONE:
                    raise BrokenPipeError(error.errno, error.strerror) from error
                raise OSError(error.errno, error.strerror, self.name) from error
        return size

    def draw(self, text: bytes) -> None:
        """Replaces the status line. Skipped if the terminal takes nothing at the moment, or a text is in its line."""
        with suppress(OSError), self._alone(0) as alone:
            if alone and not self.within_line and self._ready(0):
                os.write(self._target, ERASE + text)

    def columns(self) -> int:
        """Width of the terminal now."""
        try:
            return os.get_terminal_size(self._descriptor).columns or COLUMNS
        except OSError:
            return COLUMNS

    def _framed(self, data: bytes) -> bytes:
        """Puts the status line behind the data. On stderr colours the words that name a fault."""
        erase = ERASE if (_status.text or _status.shared) and not self.within_line else b""
        if self.coloured and self._descriptor == 2 and not self.within_line:
            data = FAULT.sub(lambda found: _in_colour(found[0], "red" if found[2] else "yellow"), data)
        self.within_line = not data.endswith(b"\n")
        return erase + data + (b"" if self.within_line else _status.text)

    @contextmanager
    def _alone(self, seconds: float) -> Iterator[bool]:
        """Keeps other processes from writing to the terminal. Yields False if one has kept this one waiting so long."""
        if not self.draws or _status.writing:  # a signal's handler may write in the middle of a text
            yield True
            return
        _status.writing, end = True, time.monotonic() + seconds
        try:
            while not (alone := _lock(self._target)) and time.monotonic() < end:
                time.sleep(0.001)
            yield alone
        finally:
            _status.writing = False
            with suppress(OSError):
                fcntl.flock(self._target, fcntl.LOCK_UN)

    def _takes_more(self) -> bool:
        """Waits once for a reader that has stopped. Until it reads again, later text is dropped without waiting."""
        ready = self._ready(None if self.product else 1000 * self._patience)
        self._patience = PATIENCE if ready else 0.0
        return ready

    def _ready(self, milliseconds: float | None) -> bool:
        """True if there is room for some bytes. Threads may call it at the same time: each polls on its own."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(milliseconds))


def _without_waiting(descriptor: int) -> int:
    """Opens a terminal once more, such that a write that finds no room returns. The flag of the descriptor itself is
    shared with other processes. Returns the descriptor if that is not possible.
    """
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return descriptor


def _lock(terminal: int) -> bool:
    """Locks a terminal that was opened again. False if another process has locked it."""
    try:
        fcntl.flock(terminal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a terminal without locks
        return True
    return True


class _Status:
    """The status line as this process draws it."""

    text = b""  # ends at the start of the line: what another process writes there comes first
    shared = False  # another process may draw one
    writing = False  # this process is writing to the terminal


_status = _Status()
_outputs: dict[int, Output] = {}  # by descriptor, once `begin` was called


def begin() -> None:
    """Prepares the terminal; called before a command's heavy imports. Standard output and error then accept any text,
    from Python and from C; until `loaded`, Ctrl-C ends the process with one line and exit code 130, and a missing
    package is one line.
    """
    if _outputs:
        return
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by >&-: otherwise the next opened file gets this descriptor, and libraries' prints
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        _outputs[descriptor] = Output(descriptor, f"<{name}>")
        stream = _text(getattr(sys, name), _outputs[descriptor])
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    _status.shared = not first_rank()
    atexit.register(status, "")
    os.register_at_fork(after_in_child=_forget_status)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    sys.excepthook = _failed_to_load


def begin_if_command() -> None:
    """Calls `begin` if this process runs `python -m` with one of our modules: Python imports its package first."""
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m") if sys.argv[:1] == ["-m"] else ""
    if module.partition(".")[0] in OWN_PACKAGES:
        begin()


def loaded() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt from now on, and errors print their traceback."""
    if sys.excepthook is _failed_to_load:
        sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def status(text: str) -> None:
    """Draws the status line: one line of at most `status_columns()` characters; "" removes it. Does nothing without a
    terminal.
    """
    output, before = _drawing(), _status.text
    if output is None:
        return
    _status.text = text.encode(_encoding(), "replace") + b"\r" if text else b""
    if text or before or _status.shared:
        output.draw(_status.text)


def status_columns() -> int:
    """Returns the width of the status line in characters; 0 if there is no terminal for it."""
    output = _drawing()
    return output.columns() - 1 if output is not None else 0  # a full line would make some terminals begin the next


def share_status() -> None:
    """Declares that a child process may draw a status line: this one's text erases it first."""
    _status.shared = True


def in_colour(text: str, colour: str, *, in_status: bool = False) -> str:
    """The text, in one of COLOURS if stdout is a terminal and NO_COLOR is not set. in_status: for the status line."""
    output = _drawing() if in_status else _outputs.get(1)
    return _in_colour(text.encode(), colour).decode() if output is not None and output.coloured else text


def plain_ascii() -> bool:
    """True if the terminal's encoding has no block characters."""
    return not _encoding().lower().replace("-", "").startswith("utf")


def _drawing() -> Output | None:
    """The output whose terminal has the status line; None, too, if another rank draws it."""
    return next((output for output in _outputs.values() if output.draws and first_rank()), None)


def first_rank() -> bool:
    """True for the first of several ranks, and for a process that is none."""
    return os.environ.get("RANK", "0") == "0"


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"


def _in_colour(text: bytes, colour: str) -> bytes:
    return b"\x1b[%dm%b\x1b[0m" % (COLOURS[colour], text)


def _forget_status() -> None:
    """The line is the parent's."""
    _status.text, _status.shared, _status.writing = b"", True, False


def _failed_to_load(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Names a package that is not installed and says how to install it; leaves any other error to Python."""
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not missing or missing in OWN_PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: the package {missing} is missing: {INSTALL}", file=sys.stderr)


def product() -> None:
    """Declares that later prints are the command's result: if they cannot be written, the command ends."""
    if _outputs:
        _outputs[1].product = True
        assert isinstance(sys.stdout, io.TextIOWrapper)
        sys.stdout.reconfigure(line_buffering=True)  # the print raises a failure, not Python's exit


def _text(before: TextIO | None, output: Output) -> io.TextIOWrapper:
    """A text stream like the previous one; None if there was none."""
    if not isinstance(before, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(output), "utf-8", "backslashreplace", line_buffering=True)
    with suppress(OSError):
        before.flush()
    through = before.write_through
    buffer: Any = output if through else io.BufferedWriter(output)
    return io.TextIOWrapper(
        buffer, before.encoding, before.errors, line_buffering=before.line_buffering, write_through=through
    )


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ends the process on Ctrl-C. Nothing has to be undone yet, and an exception would appear inside an import."""
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(EXIT_INTERRUPTED)

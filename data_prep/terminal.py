"""Makes standard output, standard error and Ctrl-C safe for every command: work continues if a text cannot be written,
and Ctrl-C while a command loads prints one line. A separate module, because it must be imported before heavy ones.
"""

import errno
import io
import os
import select
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, TextIO

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells count
PATIENCE = 10.0  # seconds to wait for a reader that has stopped reading: a pager, or a terminal after Ctrl-S
PIECE = 4096  # bytes that a pipe takes without blocking, if it takes any
GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)  # the reader has ended, or the terminal is closed
OWN_PACKAGES = ("data_prep", "pretrain", "launch")


class Output(io.RawIOBase):
    """A file descriptor to which writing never fails: text that cannot be written, or is not read, is dropped.

    product: the text is the command's result, so writing waits for the reader and raises the first failure.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name, self.mode, self.product = name, "w", False
        self._descriptor, self._patience = descriptor, PATIENCE
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Accepts all bytes. Raises BrokenPipeError or OSError only for a product, and only once."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self._takes_more():
                left = left[os.write(self._descriptor, left[:PIECE]) :]
        except OSError as error:
            if self.product:
                self.product = False
                if error.errno in GONE:
                    raise BrokenPipeError(error.errno, error.strerror) from error
                raise OSError(error.errno, error.strerror, self.name) from error
        return size

    def _takes_more(self) -> bool:
        """Waits once for a reader that has stopped. Until it reads again, later text is dropped without waiting."""
        ready = bool(self._poll.poll(None if self.product else 1000 * self._patience))
        self._patience = PATIENCE if ready else 0.0
        return ready


_outputs: dict[int, Output] = {}  # by descriptor, once `begin` was called


def begin() -> None:
    """Prepares the terminal; called before a command's heavy imports. Standard output and error then accept any text,
    from Python and from C; until `loaded`, Ctrl-C ends the process with one line and exit code 130.
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
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def begin_if_command() -> None:
    """Calls `begin` if this process runs `python -m` with one of our modules: Python imports its package first."""
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m") if sys.argv[:1] == ["-m"] else ""
    if module.partition(".")[0] in OWN_PACKAGES:
        begin()


def loaded() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt from now on."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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

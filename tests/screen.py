"""A terminal of a given size in front of real processes: what they write, and what a person would see of it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLOUR = re.compile(r"\x1b\[\d+m")
CONTROL = re.compile(r"\x1b\[K|\r|\n|[^\r\n\x1b]+")


def on_a_terminal(command: list[str], columns: int = 80, **environment: str) -> tuple[int, str]:
    """Runs it with all three streams on a terminal of that width: its exit code, and all that it has written."""
    window, terminal = pty.openpty()
    resize(terminal, columns)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"} | environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        written = read_all(window)
        return process.wait(timeout=60), written
    finally:
        process.kill()
        os.close(window)


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def read_all(window: int) -> str:
    """Reads until no process has the terminal open any more."""
    written = b""
    try:
        while data := os.read(window, 65536):
            written += data
    except OSError:  # the way in which Linux says so
        pass
    return written.decode(errors="replace")


def lines_on_screen(written: str) -> list[str]:
    """Returns the lines left on the screen. The screen is as wide as its longest line."""
    lines, line, at = [], "", 0
    for piece in CONTROL.findall(COLOUR.sub("", written)):
        if piece == "\n":
            lines, line, at = [*lines, line], "", 0
        elif piece == "\r":
            at = 0
        elif piece == "\x1b[K":
            line = line[:at]
        else:
            line = line[:at].ljust(at) + piece + line[at + len(piece) :]
            at += len(piece)
    return [each.rstrip() for each in [*lines, line]]

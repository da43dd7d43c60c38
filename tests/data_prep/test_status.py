"""The status line on a real terminal, beside text of several processes."""

import os
import pty
import re
import subprocess
import sys

import pytest

from tests.screen import ROOT, lines_on_screen, on_a_terminal

COUNTS = """
import os, sys, time
from data_prep import terminal
terminal.begin()
from data_prep.progress import progress
for item in progress(range(4), "convert"):
    time.sleep(0.12)
    print("text", item)
    print(f"warning: {item} is odd", file=sys.stderr)
print("error: the last one", file=sys.stderr)
print("written: x")
"""
INTERRUPTED = """
import os, signal
from data_prep import terminal
terminal.begin()
from data_prep.command import one_line
from data_prep.progress import progress
with one_line():
    for item in progress(range(4), "convert"):
        if item == 2:
            os.kill(os.getpid(), signal.SIGINT)
"""
TWO_PROCESSES = """
import subprocess, sys
from data_prep import terminal
terminal.begin()
terminal.share_status()
draws = '''
from data_prep import terminal
terminal.begin()
for step in range(300):
    terminal.status(f"bar {step} " + "x" * 50)
    print("step %d\\\\n" % step, end="", flush=True)
'''
child = subprocess.Popen([sys.executable, "-c", draws])
line = 0
while child.poll() is None:
    sys.stderr.write(f"of another process {line}\\n")
    sys.stderr.flush()
    line += 1
"""
KILLED = """
import subprocess, sys
from data_prep import terminal
terminal.begin()
terminal.share_status()
draws = '''
import os, signal
from data_prep import terminal
terminal.begin()
terminal.status("bar " + "x" * 40)
os.kill(os.getpid(), signal.SIGKILL)
'''
subprocess.run([sys.executable, "-c", draws])
print("error: rank 1 failed", file=sys.stderr)
"""
LEFT = [f"{kind} {n}{end}" for n in range(4) for kind, end in (("text", ""), ("warning:", " is odd"))]
LEFT += ["error: the last one", "written: x", ""]


def run(code: str, columns: int = 80, **environment: str) -> str:
    code_of_end, written = on_a_terminal([sys.executable, "-c", code], columns, **environment)
    assert code_of_end == 0, written
    return written


def test_text_and_bar_do_not_mix():
    written = run(COUNTS)
    assert lines_on_screen(written) == LEFT
    assert "█" in written and re.search(r"convert  50% .* 2 of 4, \d:\d\d:\d\d left", written)
    assert "\x1b[33mwarning:\x1b[0m 3 is odd" in written and "\x1b[31merror:\x1b[0m the last one" in written


def test_no_color_has_a_bar_and_no_colour():
    written = run(COUNTS, NO_COLOR="1")
    assert lines_on_screen(written) == LEFT
    assert "█" in written and set(re.findall(r"\x1b\[\d*\w", written)) == {"\x1b[K"}


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_dumb_terminal_gets_plain_lines(term):
    written = run(COUNTS, TERM=term) if term else run(f"import os; del os.environ['TERM']\n{COUNTS}")
    assert "\x1b" not in written and written.replace("\r\n", "\n").splitlines() == LEFT[:-1]


def test_a_pipe_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", COUNTS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert sorted(done.stdout.splitlines() + done.stderr.splitlines()) == sorted(LEFT[:-1])


def test_a_bar_is_narrower_than_the_window():
    written = run(COUNTS, columns=40)
    assert lines_on_screen(written) == LEFT
    drawn = [re.sub(r"\x1b\[\d+m", "", bar) for bar in re.findall(r"\x1b\[K(convert.*?)\r", written)]
    assert drawn and all(len(bar) < 40 for bar in drawn)


def test_an_encoding_without_blocks_gets_ascii():
    written = run(COUNTS, PYTHONIOENCODING="latin-1")
    assert lines_on_screen(written) == LEFT and re.search(r"50% \S*#", written)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_two_processes_share_a_terminal(unbuffered):
    """One draws the bar, the other writes as fast as it can."""
    lines = lines_on_screen(run(TWO_PROCESSES, PYTHONUNBUFFERED=unbuffered))
    steps = [line for line in lines if line.startswith("step")]
    others = [line for line in lines if line.startswith("of another")]
    assert steps == [f"step {n}" for n in range(300)]
    assert others == [f"of another process {n}" for n in range(len(others))] and len(others) > 10
    assert len(lines) == len(steps) + len(others) + 1 and lines[-1] == ""


def test_a_process_that_keeps_the_terminal_delays_one_text():
    """It was stopped in the middle of a text. To wait 2 seconds for each of 30 lines would end the process."""
    code = "import fcntl, os, signal; signal.alarm(30); held = os.open('/proc/self/fd/1', os.O_WRONLY)\n"
    code += "fcntl.flock(held, fcntl.LOCK_EX)\n"
    code += "from data_prep import terminal; terminal.PATIENCE = 2.0; terminal.begin()\n"
    code += "for line in range(30): print('line', line, flush=True)"
    assert lines_on_screen(run(code)) == [*(f"line {n}" for n in range(30)), ""]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_bar_is_drawn_again_after_a_line(unbuffered):
    code = "from data_prep import terminal; terminal.begin(); terminal.status('first')\n"
    code += "print('line\\n', end='', flush=True); terminal.status('second'); terminal.status('')"
    written = run(code, PYTHONUNBUFFERED=unbuffered)
    assert written.replace("\r\n", "\n").split("\r\x1b[K")[1:] == ["first\r", "line\nfirst\r", "second\r", ""]


def test_the_bar_of_a_killed_process_is_removed():
    written = run(KILLED)
    assert "bar xxx" in written and lines_on_screen(written) == ["error: rank 1 failed", ""]


def test_a_terminal_that_nobody_reads_holds_up_no_bar():
    """Its buffer is full after some kilobytes; a write that waits for room would never return."""
    master, slave = pty.openpty()
    draws = "from data_prep import terminal\nterminal.begin()\n"
    draws += "for step in range(5000):\n    terminal.status(f'bar {step} ' + 'x' * 400)\n"
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", draws], stdout=slave, cwd=ROOT, env=environment) as process:
        try:
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
            os.close(slave)
            os.close(master)


def test_ctrl_c_leaves_a_clean_line():
    code, written = on_a_terminal([sys.executable, "-c", INTERRUPTED])
    assert code == 130 and "convert" in written
    assert lines_on_screen(written) == ["error: interrupted", ""]

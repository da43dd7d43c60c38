"""Tests output that cannot be written, and Ctrl-C while a command loads, in real processes of every command."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEAKS = """
import ctypes, logging, sys, warnings
from data_prep import terminal
terminal.begin()
for _ in range(3):
    print("x" * 9000)
    print("a line", file=sys.stderr, flush=True)
    sys.stdout.buffer.write(b"bytes")
    sys.__stdout__.write("text")
    sys.stdout.flush()
    warnings.warn("a warning")
    logging.warning("a record")
    ctypes.CDLL(None).puts(b"of C")
with open(sys.argv[1], "w") as file:
    file.write("work")
sys.exit(7)
"""
PRODUCT = "from data_prep import terminal; terminal.begin(); terminal.product(); print('x' * 100_000); print('more')"


@contextmanager
def output(kind: str) -> Iterator[int | None]:
    """A descriptor that cannot be written; None: a closed one."""
    if kind == "closed":
        yield None
        return
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    elif kind == "read only":
        descriptor = os.open(os.devnull, os.O_RDONLY)
    elif kind == "reader gone":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        terminal, descriptor = pty.openpty()
        os.close(terminal)  # its window
    yield descriptor
    os.close(descriptor)


def run(arguments: list[object], descriptor: int | None) -> subprocess.Popen:
    """Runs a command with both streams open; the shell closes the ones to be closed."""
    command = [sys.executable, *map(str, arguments)]
    if descriptor is None:
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    process = subprocess.Popen(command, cwd=ROOT, stdout=descriptor, stderr=descriptor, start_new_session=True)
    process.wait(timeout=60)
    return process


@pytest.mark.parametrize("kind", ["closed", "full", "read only", "reader gone", "dead terminal"])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_failed_prints_do_not_change_the_exit_code(tmp_path, kind, unbuffered):
    with output(kind) as descriptor:
        done = run([*(["-u"] if unbuffered else []), "-c", SPEAKS, tmp_path / "work"], descriptor)
    assert done.returncode == 7
    assert (tmp_path / "work").read_text() == "work", "nothing else was written to that descriptor"


def test_output_is_written_in_order():
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT + "; print('é', end='')"], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.stdout.decode() == "x" * 100_000 + "\nmore\né" and done.stderr == b"" and done.returncode == 0


def test_stopped_reader_does_not_block_the_process():
    """The reader (a pager) later gets the complete text up to the point at which it stopped."""
    code = "from data_prep import terminal; terminal.PATIENCE = 0.1; terminal.begin()\n"
    code += "for i in range(30_000): print('line', i)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    process.wait(timeout=60)
    said, _ = process.communicate()
    assert process.returncode == 0 and said.startswith(b"line 0\nline 1\nline 2\n") and len(said) >= 2**15


@pytest.mark.parametrize("kind,code", [("reader gone", 141), ("dead terminal", 141), ("full", 2), ("closed", 0)])
def test_lost_reader_ends_a_command_whose_text_is_its_result(kind, code):
    """Ends without a line if the reader has ended, with an error if the text is lost."""
    command = [sys.executable, "-m", "pretrain.data"]  # its help
    with output(kind) as descriptor:
        command = command if descriptor is not None else ["sh", "-c", 'exec "$@" >&-', "sh", *command]
        done = subprocess.run(command, cwd=ROOT, stdout=descriptor, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr == ("error: [Errno 28] No space left on device: '<stdout>'\n" if kind == "full" else "")


COMMANDS = [
    "data_prep/tokenize.py",
    "-m data_prep.tokenize",
    "-m data_prep.formats",
    "launch/local.py",
    "launch/slurm.py",
    "launch/plan.py",
    "launch/demo.py",
    "-m launch.job",
    "-m pretrain.train",
    "-m pretrain.generate",
    "-m pretrain.data",
    "-m pretrain.checkpoint",
    "-m pretrain.lens",
    "-m pretrain.profile",
    "-m pretrain.sweep_report",
    "-m pretrain.coordinate_check",
    "-m pretrain.tie_report",
    "-m pretrain.interop.hf",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_loading_is_one_line(tmp_path, command):
    """Interrupts the first heavy import, through a stand-in module."""
    for name in ("numpy", "torch", "hydra", "submitit"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    arguments = command.split() if command.startswith("-m") else [ROOT / command]
    command = [sys.executable, *map(str, arguments), "x=1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_ctrl_c_stays_ignored():
    """A script starts background jobs with Ctrl-C ignored."""
    code = "import os, signal; from data_prep import terminal; terminal.begin(); terminal.loaded()"
    code += "; os.kill(os.getpid(), signal.SIGINT)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode == 0


@pytest.mark.parametrize("kind", ["reader gone", "full"])
def test_tokenising_continues_without_a_reader(tmp_path, command, kind):
    """The result is the token files, not the printed text."""
    with output(kind) as descriptor:
        done = run(["data_prep/tokenize.py", *command, f"out={tmp_path / 'out'}"], descriptor)
    assert done.returncode == 0 and (tmp_path / "out" / "manifest.json").is_file()
    with output(kind) as descriptor:
        done = run(["data_prep/tokenize.py", f"verify={tmp_path / 'out'}"], descriptor)
    assert done.returncode == (141 if kind == "reader gone" else 2)

"""Starts rank processes on this machine and watches them: hands signals on, and ends all when one has failed.

Knows neither Slurm nor torch. A rank never outlives its supervisor, and its stderr goes through it, so that the last
line of a rank that has failed can be told.
"""

import ctypes
import linecache
import math
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.exits import Exit
from pretrain.stops import STOP_SIGNALS, StopRequests

LOOK_SECONDS = 0.05
ELSEWHERE_SECONDS = 0.5  # between looks at a file system that all nodes share
NOTICE_SECONDS = 0.5  # for a thread of a rank to learn that it is about to be stopped
DUMP_SECONDS = 5.0  # for a rank to write its stacks, once another one hangs
KEPT_BYTES = 1 << 18  # of a rank's stderr
NO_EXIT_STATUS = "gone without a word"
STACKS = b"(most recent call first):"  # faulthandler's, as is this
INNERMOST = re.compile(r'^(Current thread|Thread) .*\n  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
HOST_READ = ("/pretrain/vocab/collectives.py", "on_host")  # NCCL does not block the host: this does, soon after
OTHER_HOST_READS = re.compile(r"\.wait\(|\.item\(\)|\bsynchronize\(|\b(bool|float)\(.*norm\b")  # DeepSpeed's, too
OF_ANOTHER_THREAD = ("/threading.py", "/torch/autograd/graph.py")  # here a thread waits for another one of its process
NCCL_ERROR = re.compile(r"NCCL error.*|Watchdog caught collective.*")
PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Record:
    """How one rank has ended. code: as `subprocess` gives it; last: what it said last on stderr; time: unix seconds.

    waits: it hung in a collective, so that the fault is another rank's.
    """

    rank: int
    ending: Exit
    code: int
    last: str = ""
    waits: bool = False
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ending": self.ending.name}

    @classmethod
    def silent(cls, rank: int, host: str) -> "Record":
        """Record of a rank whose end was not seen: it, its supervisor or its node is gone."""
        return cls(rank, Exit.KILLED, -signal.SIGKILL, NO_EXIT_STATUS, host=host)

    @classmethod
    def of_dict(cls, fields: dict[str, Any]) -> "Record":
        return cls(**fields | {"ending": Exit[fields["ending"]]})

    @property
    def how(self) -> str:
        """Describes the end in words."""
        if self.last == NO_EXIT_STATUS:
            return NO_EXIT_STATUS
        if self.ending is Exit.HUNG:
            return f"hung in {self.last}"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}, {self.ending.name}"


class _Rank:
    """One process, in a session of its own: a Ctrl-C of the terminal reaches it through its supervisor alone."""

    def __init__(self, rank: int, command: list[str], environment: dict[str, str]) -> None:
        supervisor = os.getpid()

        def die_with_supervisor() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(1)

        self.rank, self.said, self._line, self._stopped = rank, b"", b"", -math.inf
        self.process = subprocess.Popen(
            command,
            env=environment | own_code(environment) | allocator(environment),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=die_with_supervisor,
        )
        assert self.process.stderr is not None
        self.stderr = self.process.stderr.fileno()
        os.set_blocking(self.stderr, False)

    def pump(self) -> bool:
        """Hands on the lines that it has written; False at the end of them."""
        try:
            while data := os.read(self.stderr, KEPT_BYTES):
                self._hand_on(data)
        except BlockingIOError:
            return True
        return False

    def _hand_on(self, data: bytes) -> None:
        """Whole lines: two ranks may write at the same time."""
        if STACKS in data and STACKS not in self.said:
            self._line = b"stacks of rank %d:\n" % self.rank + self._line
        self.said = (self.said + data)[-KEPT_BYTES:]
        lines, end, self._line = (self._line + data).rpartition(b"\n")
        sys.stderr.buffer.write(lines + end)
        sys.stderr.flush()

    def over(self) -> bool:
        """True if it has ended; not yet reaped, its number still stands for it and its children."""
        flags = os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG
        state = os.waitid(os.P_PID, self.process.pid, flags)
        stopped = state is not None and state.si_code == os.CLD_STOPPED
        if stopped:
            self._stopped = time.monotonic()
        return state is not None and not stopped

    def kill(self) -> None:
        self.signal_group(signal.SIGKILL)

    def signal_group(self, number: int) -> None:
        """To it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def reap(self) -> int:
        """Its return code. Whatever it has started ends too."""
        self.kill()
        code = self.process.wait()
        self.pump()
        self._hand_on(b"\n" if self._line else b"")
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def record(self, ending: Exit, code: int) -> Record:
        said = self.said.decode(errors="replace")
        if ending is Exit.HUNG:
            if time.monotonic() < self._stopped + DUMP_SECONDS:  # Slurm continues whom it ends
                return Record(self.rank, ending, code, "a stop, by SIGSTOP or a like signal")
            stacks = INNERMOST.findall(said)
            current = [frame for thread, *frame in stacks if thread.startswith("Current")]
            if not current:
                return Record(self.rank, ending, code, "a state in which it cannot tell its stack")
            path, line, function = current[-1]
            deciding = [frame for thread, *frame in stacks] if path.endswith(OF_ANOTHER_THREAD) else [current[-1]]
            waits = any(_waits_for_a_peer(*frame) for frame in deciding)
            return Record(self.rank, ending, code, f"{function}, {path}:{line}", waits)
        lines = said.strip().splitlines()
        if ending is Exit.LOST_PEER and code == -signal.SIGABRT:
            lines = NCCL_ERROR.findall(said) or lines  # behind it there are stacks
        return Record(self.rank, ending, code, lines[-1].strip() if lines else "")


def own_code(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that make a Python process import this code, whatever the current folder or PYTHONPATH holds."""
    path = [str(ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]  # "" is the current folder
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


@contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """With that handler, unless the signal is ignored. Python has handlers in the main thread alone."""
    before = signal.getsignal(number)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """The GPU allocator's setting: large blocks of many sizes would break its memory up. What the user set stays."""
    given = any(key in environment for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return {} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _waits_for_a_peer(path: str, line: str, function: str) -> bool:
    """True if a thread that hangs in this frame waits for another rank: in a collective, or for a GPU that does."""
    if "/torch/distributed/" in path or (path.endswith(HOST_READ[0]) and function == HOST_READ[1]):
        return True
    return (
        not path.endswith(OF_ANOTHER_THREAD) and OTHER_HOST_READS.search(linecache.getline(path, int(line))) is not None
    )


class Supervisor:
    """Runs `command` once for each rank, with the environment given for it.

    `elsewhere` says whether, and how, a rank that another supervisor watches has failed; `record` is called with each
    rank's record as soon as it has ended.
    """

    def __init__(
        self,
        command: list[str],
        environments: dict[int, dict[str, str]],
        requests: StopRequests,
        *,
        record: Callable[[Record], None] = lambda record: None,
        elsewhere: Callable[[], Exit | None] = lambda: None,
    ) -> None:
        self.command, self.environments, self.requests = command, environments, requests
        self.record, self.elsewhere = record, elsewhere
        self._alive: list[_Rank] = []
        self._selector = selectors.DefaultSelector()

    def run(self) -> list[Record]:
        """Until all have ended; their records, in the order of their ends. Ctrl-Z stops the ranks, too."""
        with _handled(signal.SIGTSTP, self._pause):
            return self._run()

    def _run(self) -> list[Record]:
        self._start()
        records: list[Record] = []
        handed_on, look_elsewhere = 0, 0.0
        while self._alive:
            self._look()
            records += self._ended(Exit.of)
            if handed_on < self.requests.count:
                handed_on = self.requests.count
                self._send(signal.SIGTERM)
            failure = next((record.ending for record in records if not record.ending.good), None)
            if failure is None and time.monotonic() >= look_elsewhere:
                failure, look_elsewhere = self.elsewhere(), time.monotonic() + ELSEWHERE_SECONDS
            if failure is not None:
                records += self._end(failure)
        self._selector.close()
        return records

    def _start(self) -> None:
        """With the signals blocked, in the ranks too: what comes before a rank has its handlers waits for them."""
        blocked = (*STOP_SIGNALS, signal.SIGTSTP)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            for rank, environment in self.environments.items():
                self._alive.append(_Rank(rank, self.command, environment))
                self._selector.register(self._alive[-1].stderr, selectors.EVENT_READ, self._alive[-1])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Stops the ranks, which are in sessions of their own, and this process, until SIGCONT, as of `fg`."""
        with _handled(signal.SIGTSTP, signal.SIG_IGN):
            self._send(signal.SIGTSTP)  # their watchdogs must not count the pause
            time.sleep(NOTICE_SECONDS)
            for rank in self._alive:
                rank.signal_group(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            for rank in self._alive:
                rank.signal_group(signal.SIGCONT)

    def _look(self) -> None:
        start = time.monotonic()
        for key, _ in self._selector.select(LOOK_SECONDS):
            if not key.data.pump():
                self._selector.unregister(key.fileobj)
        time.sleep(max(0.0, LOOK_SECONDS - (time.monotonic() - start)))

    def _ended(self, ending: Callable[[int], Exit]) -> Iterator[Record]:
        for rank in [rank for rank in self._alive if rank.over()]:
            self._alive.remove(rank)
            with suppress(KeyError):
                self._selector.unregister(rank.stderr)
            code = rank.reap()
            found = ending(code)
            if code == -signal.SIGABRT and b"ProcessGroupNCCL" in rank.said:  # its watchdog: a collective has failed
                found = Exit.LOST_PEER
            record = rank.record(found, code)
            self.record(record)
            yield record

    def _end(self, failure: Exit) -> Iterator[Record]:
        """All that are left. When one hangs, what the others were at is the better half of the story."""
        ending = Exit.HUNG if failure is Exit.HUNG else Exit.ENDED
        if failure is Exit.HUNG:
            self._send(signal.SIGALRM)
            late = time.monotonic() + DUMP_SECONDS
            while time.monotonic() < late and not all(rank.over() for rank in self._alive):
                self._look()
        for rank in self._alive:
            rank.kill()
        while self._alive:
            self._look()
            yield from self._ended(lambda code: ending)

    def _send(self, number: int) -> None:
        for rank in self._alive:
            with suppress(ProcessLookupError):
                os.kill(rank.process.pid, number)

"""Starts rank processes on this machine and watches them: forwards signals, and ends all ranks if one has failed.

Imports neither Slurm nor torch. A rank never outlives its supervisor. Its stderr passes through the supervisor, which
keeps the last line for the report of a failure.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from data_prep import terminal
from pretrain.exits import Exit
from pretrain.stops import STOP_SIGNALS, StopRequests

LOOK_SECONDS = 0.05  # between looks at the ranks of this machine
ELSEWHERE_SECONDS = 0.5  # between looks at the shared file system
NOTICE_SECONDS = 0.5  # for the watchdog thread of a rank to notice that the rank is about to be stopped
DUMP_SECONDS = 5.0  # for the ranks to write their stacks after one hung
KEPT_BYTES = 1 << 18  # kept of a rank's stderr
NO_EXIT_STATUS = "no exit status"
NO_EXIT_STATUS_BEFORE = "gone without a word"  # english: quoted; in records of earlier versions
STACKS = b"(most recent call first):"  # printed by faulthandler, as is the next pattern
INNERMOST = re.compile(r'^(Current thread|Thread) .*\n  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
HOST_READ = ("/pretrain/vocab/collectives.py", "on_host")  # NCCL does not block the host; this read blocks soon after
OTHER_HOST_READS = re.compile(r"\.wait\(|\.item\(\)|\bsynchronize\(|\b(bool|float)\(.*norm\b")  # DeepSpeed's included
OF_ANOTHER_THREAD = (
    "/threading.py",
    "/torch/autograd/graph.py",
)  # here a thread waits for another thread of its process
NCCL_ERROR = re.compile(r"NCCL error.*|Watchdog caught collective.*")
PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Record:
    """End of one rank."""

    rank: int
    ending: Exit
    code: int  # return code, as in `subprocess`
    last: str = ""  # last line on stderr; of a hang, the innermost frame
    waits: bool = False  # it hung in a collective: another rank is at fault
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)  # unix time, seconds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ending": self.ending.name}

    @classmethod
    def silent(cls, rank: int, host: str) -> "Record":
        """Makes the record of a rank without an exit status: the rank, its supervisor or its node was lost."""
        return cls(rank, Exit.KILLED, -signal.SIGKILL, NO_EXIT_STATUS, host=host)

    @classmethod
    def of_dict(cls, fields: dict[str, Any]) -> "Record":
        record = cls(**fields | {"ending": Exit[fields["ending"]]})
        return replace(record, last=NO_EXIT_STATUS) if record.last == NO_EXIT_STATUS_BEFORE else record

    @property
    def how(self) -> str:
        """Description of the end."""
        if self.last == NO_EXIT_STATUS:
            return NO_EXIT_STATUS
        if self.ending is Exit.HUNG:
            return f"hung in {self.last}"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}, {self.ending.name}"


class _Rank:
    """One rank process, in its own session: a Ctrl-C in the terminal reaches it only through the supervisor."""

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
        """Forwards the complete lines that the rank has written. Returns False at the end of its stderr."""
        try:
            while data := os.read(self.stderr, KEPT_BYTES):
                self._forward(data)
        except BlockingIOError:
            return True
        return False

    def _forward(self, data: bytes) -> None:
        """Writes complete lines only: two ranks may write at the same time."""
        if STACKS in data and STACKS not in self.said:
            self._line = b"stacks of rank %d:\n" % self.rank + self._line
        self.said = (self.said + data)[-KEPT_BYTES:]
        lines, end, self._line = (self._line + data).rpartition(b"\n")
        sys.stderr.buffer.write(lines + end)
        sys.stderr.flush()

    def over(self) -> bool:
        """True if the process has ended. It is not reaped yet, so its process id is not reused."""
        flags = os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG
        state = os.waitid(os.P_PID, self.process.pid, flags)
        stopped = state is not None and state.si_code == os.CLD_STOPPED
        if stopped:
            self._stopped = time.monotonic()
        return state is not None and not stopped

    def kill(self) -> None:
        self.signal_group(signal.SIGKILL)

    def signal_group(self, number: int) -> None:
        """Sends the signal to the rank and all processes it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def reap(self) -> int:
        """Returns the return code, after ending all processes that the rank has started."""
        self.kill()
        code = self.process.wait()
        self.pump()
        self._forward(b"\n" if self._line else b"")
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def record(self, ending: Exit, code: int) -> Record:
        said = self.said.decode(errors="replace")
        if ending is Exit.HUNG:
            if time.monotonic() < self._stopped + DUMP_SECONDS:  # Slurm sends SIGCONT to a process that it ends
                return Record(self.rank, ending, code, "a stop, by SIGSTOP or a similar signal")
            stacks = INNERMOST.findall(said)
            current = [frame for thread, *frame in stacks if thread.startswith("Current")]
            if not current:
                return Record(self.rank, ending, code, "a state in which it could not print its stack")
            path, line, function = current[-1]
            deciding = [frame for thread, *frame in stacks] if path.endswith(OF_ANOTHER_THREAD) else [current[-1]]
            waits = any(_waits_for_a_peer(*frame) for frame in deciding)
            return Record(self.rank, ending, code, f"{function}, {path}:{line}", waits)
        lines = said.strip().splitlines()
        if ending is Exit.LOST_PEER and code == -signal.SIGABRT:
            lines = NCCL_ERROR.findall(said) or lines  # stacks follow the error
        return Record(self.rank, ending, code, lines[-1].strip() if lines else "")


def own_code(environment: Mapping[str, str]) -> dict[str, str]:
    """Builds variables that make Python import this code, whatever the current folder and PYTHONPATH contain."""
    path = [
        str(ROOT),
        *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
    ]  # "" means the current folder
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


@contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Sets the handler while the context lasts, unless the signal is ignored or this is not the main thread."""
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
    """Builds the setting of the GPU allocator that avoids fragmentation by large blocks. Keeps the user's setting."""
    given = any(key in environment for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return {} if given else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _waits_for_a_peer(path: str, line: str, function: str) -> bool:
    """True if a thread that hangs in this frame waits for another rank, in a collective or through its GPU."""
    if "/torch/distributed/" in path or (path.endswith(HOST_READ[0]) and function == HOST_READ[1]):
        return True
    return (
        not path.endswith(OF_ANOTHER_THREAD) and OTHER_HOST_READS.search(linecache.getline(path, int(line))) is not None
    )


class Supervisor:
    """Runs `command` once per rank, with that rank's environment.

    `elsewhere` returns how a rank of another supervisor has failed, if one has. `record` is called with a rank's record
    as soon as the rank has ended.
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
        """Waits until all ranks have ended. Returns their records in that order. Ctrl-Z stops the ranks as well."""
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
        """Starts the ranks with the signals blocked: an early signal waits until the rank has set its handlers."""
        blocked = (*STOP_SIGNALS, signal.SIGTSTP)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            for rank, environment in self.environments.items():
                self._alive.append(_Rank(rank, self.command, environment))
                self._selector.register(self._alive[-1].stderr, selectors.EVENT_READ, self._alive[-1])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Stops the ranks, each in its own session, and this process, until SIGCONT, which `fg` sends."""
        with _handled(signal.SIGTSTP, signal.SIG_IGN):
            self._send(signal.SIGTSTP)  # the watchdogs must not count the pause
            time.sleep(NOTICE_SECONDS)
            for rank in self._alive:
                rank.signal_group(signal.SIGSTOP)
            terminal.status("")  # the shell's prompt comes next
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
            if (
                code == -signal.SIGABRT and b"ProcessGroupNCCL" in rank.said
            ):  # aborted by NCCL's watchdog: a collective has failed
                found = Exit.LOST_PEER
            record = rank.record(found, code)
            self.record(record)
            yield record

    def _end(self, failure: Exit) -> Iterator[Record]:
        """Ends the remaining ranks. If one hung, first lets the others print their stacks, which help to explain it."""
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

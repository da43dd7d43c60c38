"""Rendezvous of the ranks, before there is a process group, with readable errors if it fails.

Not part of mesh.py, because nothing here is used after the ranks have met. The store is torch's, on rank 0 or
torchrun's.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

SAY_SECONDS = 10.0  # a rank that has waited this long prints what it waits for
CONNECT_SECONDS = 10.0
NAME_SECONDS = 20.0  # to wait for an unknown host name: that of a new pod appears late
STEP = timedelta(seconds=0.5)
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them
HOPELESS = ("Unable to find address for", "no socket interface found", "ncclInvalidUsage")
SOURCE = re.compile(r"^\[(?:enforce fail at )?\S+:\d+\] (?:ifa != nullptr\. )?")
BACKTRACE = ("Exception raised from", "C++ CapturedTraceback", "frame #")


class NotMet(RuntimeError):
    """The ranks have not met. hopeless: another start with the same settings cannot help."""

    def __init__(self, message: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


def words(error: BaseException) -> str:
    """Returns a library's error in one line, without source location and backtrace."""
    lines: list[str] = []
    for line in str(error).splitlines():
        if line.startswith(BACKTRACE):
            break
        lines += [SOURCE.sub("", line.strip()).rstrip(".")] * bool(line.strip())
    return "; ".join(lines) or type(error).__name__


def hopeless(error: BaseException) -> bool:
    """True if the settings name an interface or a device that cannot form a process group."""
    return any(text in str(error) for text in HOPELESS)


@contextmanager
def in_its_words() -> Iterator[None]:
    """Raises NotMet in place of a library's RuntimeError while the ranks meet."""
    try:
        yield
    except (NotMet, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise NotMet(words(error), hopeless(error)) from error


def has_peers() -> bool:
    """True if the environment says that this process is one of several ranks."""
    return all(os.environ.get(name) for name in PLACE) and os.environ["WORLD_SIZE"] != "1"


def meet(patience: timedelta, remark: str = "") -> tuple[dist.Store, int, int]:
    """Waits until all ranks have reached the store. Returns the store, this rank, and the number of ranks.

    remark: added to the line printed while waiting. Raises NotMet if a rank does not come within `patience`, ValueError
    if the environment names no store.
    """
    rank, world, port = (_whole(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address = os.environ.get("MASTER_ADDR", "")
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} in the environment must be below WORLD_SIZE={world}")
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wait = _Wait(patience, f"rank {rank} of {world} waits for the others at {address}:{port}{remark}")
    _reach(address, port, wait, connect=not own)
    store = dist.TCPStore(address, port, world, own, patience, wait_for_workers=False, multi_tenant=True)
    came = f"came-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # torchrun may keep its store for the next start
    if store.add(came, 1) > world:
        raise NotMet(f"{world} ranks have met at {address}:{port} before: are RANK and WORLD_SIZE left over?", True)
    while store.add(came, 0) < world:
        wait.on(f"{store.add(came, 0)} of {world} ranks came")
    return dist.PrefixStore("default_pg", store), rank, world


class _Wait:
    """Waits in steps, up to a limit. Prints once what for."""

    def __init__(self, patience: timedelta, what: str) -> None:
        self.start, self.patience, self.what, self.said = time.monotonic(), patience.total_seconds(), what, False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def on(self, fault: str) -> None:
        """Waits one step. Raises NotMet at the limit."""
        if self.seconds >= self.patience:
            raise NotMet(f"{fault} within {self.patience:g} s: {self.what}")
        if self.seconds >= min(SAY_SECONDS, self.patience / 2) and not self.said:
            self.said = True
            print(self.what, file=sys.stderr, flush=True)
        time.sleep(min(STEP.total_seconds(), 0.01 + self.seconds / 10))


def _reach(address: str, port: int, wait: _Wait, connect: bool) -> None:
    """Waits until the name is known and, with `connect`, until the port answers."""
    while True:
        try:
            found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            if connect:
                socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
            if found:
                return
        except (socket.gaierror, UnicodeError) as error:
            temporary = getattr(error, "errno", None) == socket.EAI_AGAIN
            said = getattr(error, "strerror", None) or str(error)
            if not temporary and wait.seconds >= min(NAME_SECONDS, wait.patience):
                raise NotMet(f"MASTER_ADDR={address}: {said}", hopeless=True) from None
            wait.on(f"MASTER_ADDR={address} was not found ({said})")
        except OSError as error:
            wait.on(f"nothing answered ({error.strerror or error})")


def _whole(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}={value} in the environment must be a whole number, as torchrun sets it")
    return int(value)

"""How the ranks find each other, before there is a process group, and what goes wrong there in the library's own words.

Apart from mesh.py because none of it is of use once the ranks have met. The store is torch's: on rank 0, or torchrun's.
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

SAY_SECONDS = 10.0  # of waiting, then the rank says what it waits for
CONNECT_SECONDS = 10.0
NAME_SECONDS = 20.0  # for a name that does not exist to appear: a new pod's is late
STEP = timedelta(seconds=0.5)
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them
HOPELESS = ("Unable to find address for", "no socket interface found", "ncclInvalidUsage")
SOURCE = re.compile(r"^\[(?:enforce fail at )?\S+:\d+\] (?:ifa != nullptr\. )?")
BACKTRACE = ("Exception raised from", "C++ CapturedTraceback", "frame #")


class NotMet(RuntimeError):
    """The ranks have not met. hopeless: nor will they at another start with the same settings."""

    def __init__(self, message: str, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


def words(error: BaseException) -> str:
    """Returns what a library says, in one line: without the place in its source, and without a backtrace."""
    lines: list[str] = []
    for line in str(error).splitlines():
        if line.startswith(BACKTRACE):
            break
        lines += [SOURCE.sub("", line.strip()).rstrip(".")] * bool(line.strip())
    return "; ".join(lines) or type(error).__name__


def hopeless(error: BaseException) -> bool:
    """True if the settings name an interface or a device with which no group of ranks can be made."""
    return any(text in str(error) for text in HOPELESS)


@contextmanager
def in_its_words() -> Iterator[None]:
    """Raises NotMet for what a library raises while the ranks meet."""
    try:
        yield
    except (NotMet, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise NotMet(words(error), hopeless(error)) from error


def has_peers() -> bool:
    """True if this process was started as one of several ranks, as far as the environment says."""
    return all(os.environ.get(name) for name in PLACE) and os.environ["WORLD_SIZE"] != "1"


def meet(patience: timedelta, remark: str = "") -> tuple[dist.Store, int, int]:
    """Waits until all ranks have come to the store; it, this rank and their number. remark: to say while it waits.

    NotMet if one has not come within `patience`, ValueError if the environment names no place to meet.
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
    """Steps of waiting, up to a limit. Says once what for."""

    def __init__(self, patience: timedelta, what: str) -> None:
        self.start, self.patience, self.what, self.said = time.monotonic(), patience.total_seconds(), what, False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def on(self, fault: str) -> None:
        """A step. NotMet at the limit."""
        if self.seconds >= self.patience:
            raise NotMet(f"{fault} within {self.patience:g} s: {self.what}")
        if self.seconds >= min(SAY_SECONDS, self.patience / 2) and not self.said:
            self.said = True
            print(self.what, file=sys.stderr, flush=True)
        time.sleep(min(STEP.total_seconds(), 0.01 + self.seconds / 10))


def _reach(address: str, port: int, wait: _Wait, connect: bool) -> None:
    """Waits until the name is known and, with `connect`, until there is something at that port."""
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

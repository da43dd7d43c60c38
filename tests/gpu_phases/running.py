"""Runs the parts of a phase, each in its own process, and writes figures and failures to PHASE.json after each."""

import contextlib
import faulthandler
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]
Part = Callable[[], Figures]  # importable, so that another process can call it
LEAST, MOST = 5.0, 300.0  # seconds: no part starts with less, or takes more


@dataclass(frozen=True)
class Runner:
    """Runs parts, and writes their results to `out`. context: of multiprocessing; it starts the processes."""

    out: Path
    size: str
    command: str
    late: float  # by time.monotonic()
    context: Any

    def run(self, phase: str, parts: Mapping[str, Part]) -> list[str]:
        """Runs the parts one after the other. Returns those that failed, or that did not start in time."""
        path = self.out / f"{phase}.json"
        record = json.loads(path.read_text()) if path.exists() else {"phase": phase, "parts": {}}
        failed = []
        for name, part in parts.items():
            say(f"{phase}: {name}")
            start = time.monotonic()
            result = self._result(part)
            result |= {"seconds": round(time.monotonic() - start, 1), "size": self.size, "command": self.command}
            record["parts"][name] = result
            path.write_text(json.dumps(record, indent=1) + "\n")
            if "error" in result:
                failed.append(f"{phase}: {name}")
                say(f"{phase}: {name}: FAILED: {result['error']}")
            else:
                say(f"{phase}: {name}: {result['seconds']:.0f} s")
        return failed

    def _result(self, part: Part) -> dict[str, Any]:
        left = min(MOST, self.late - time.monotonic())
        if left < LEAST:
            return {"error": "not started: no time was left"}
        receive, send = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_run, args=(send, part, left))
        process.start()
        send.close()
        try:
            return json.loads(receive.recv_bytes())
        except EOFError:
            return {"error": f"the process died, or was stopped after {left:.0f} s (see above)"}
        finally:
            process.join(timeout=10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group that the process has made, with what it has started
            process.join()


def _run(send: Connection, part: Part, seconds: float) -> None:
    os.setsid()
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        result: dict[str, Any] = {"figures": part()}
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
    send.send_bytes(json.dumps(result | facts()).encode())
    send.close()


def facts() -> dict[str, str]:
    """Names the device and the versions of what has computed the figures."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {"card": card, "torch": torch.__version__, "triton": triton, "python": platform.python_version()}


def say(text: str) -> None:
    print(text, flush=True)

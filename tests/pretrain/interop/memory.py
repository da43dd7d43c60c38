"""Measures the memory of import and export for a GPT-2 with a matrix of 256 MiB in fp32, beyond the program itself.

`python -m tests.pretrain.interop.memory` prints MiB. "own": memory not backed by a file. "mapped": pages of files that
it reads, which the system can reclaim.
"""

import ctypes
import tempfile
import threading
from collections.abc import Callable, Iterator

from pretrain.commands.hf import export_model, import_model
from tests.benchmarks.measure import status_mib
from tests.ranks import in_fork

VOCAB, WIDTH = 2**18, 256
KINDS = ("RssAnon", "RssFile")


def held(command: Callable[[list[str]], Iterator[str]], given: str, made: str) -> list[float]:
    """Peak MiB of each kind above the level after a first run of the command, sampled every millisecond."""
    list(command([given, f"{made}-0"]))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = [status_mib(kind) for kind in KINDS]
    most, done = before, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = [max(value, status_mib(kind)) for kind, value in zip(KINDS, most, strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    list(command([given, f"{made}-1"]))
    done.set()
    watcher.join()
    return [value - first for value, first in zip(most, before, strict=True)]


def measure() -> dict[str, list[float]]:
    """Measures each command. Needs 2 GiB of disk space while it runs."""
    import transformers

    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=4, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/fp32")
        model.bfloat16().save_pretrained(f"{folder}/bf16")
        commands = {
            "import of fp32": (import_model, f"hf={folder}/fp32", f"run={folder}/run"),
            "import of bf16": (import_model, f"hf={folder}/bf16", f"run={folder}/run-bf16"),
            "export": (export_model, f"run={folder}/run-0", f"out={folder}/out"),
        }
        return {name: in_fork(held, *command) for name, command in commands.items()}


if __name__ == "__main__":
    for name, (own, mapped) in measure().items():
        print(f"{name}: {own:.0f} own, {mapped:.0f} mapped")

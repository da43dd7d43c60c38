"""What import and export hold beyond the program itself, of a GPT-2 whose matrix has 256 MiB in fp32: prints MiB.

`python -m tests.pretrain.interop.memory`. Of its own: memory that is in no file. Mapped: pages of files that it reads,
which the system takes back where it needs room.
"""

import ctypes
import tempfile
import threading
from collections.abc import Callable, Iterator

from pretrain.commands.hf import export_model, import_model
from tests.benchmarks.measure import in_fresh_process, status_mib

VOCAB, WIDTH = 2**18, 256
KINDS = ("RssAnon", "RssFile")


def held(command: Callable[[list[str]], Iterator[str]], given: str, made: str) -> list[float]:
    """Of each kind, at most, above what the process held after a first, uncounted run; looked at every millisecond."""
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
    """By what is done. Takes 2 GiB of the disk while it runs."""
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
        return {name: in_fresh_process(held, *command) for name, command in commands.items()}


if __name__ == "__main__":
    for name, (own, mapped) in measure().items():
        print(f"{name}: {own:.0f} of its own, {mapped:.0f} mapped")

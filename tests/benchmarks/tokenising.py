"""Measures text to token files, end to end: this program and others, against a bare loop of tiktoken.

    python tests/benchmarks/tokenising.py [--megabytes 100] [--rows 32768] [--workers N] [--folder .]

Prints Markdown. The text is Python source (standard library and installed packages) in one .jsonl; the tokenizer is a
BPE that is trained on part of it first. The benchmark checks that all write the same tokens. The bare loop encodes
texts in memory on one core and writes nothing. One loop times the number of cores would be the machine's limit if cores
did not share caches and memory, so loops on all cores, each with a part of the texts, are measured as well. This
program's time includes the start of the command; other programs are timed from after their imports until their files
are on disk. The file is not named tokenize.py, because the standard library has a module of that name. Run it on a
quiet machine.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import tiktoken

from data_prep.bpe import PATTERNS, train_bpe
from data_prep.token_file import Manifest, TokenFile
from data_prep.tokenizer_spec import TokenizerSpec
from tests.benchmarks.measure import in_fresh_process, markdown, progress

SCRIPT = Path(__file__).resolve().parents[2] / "data_prep" / "tokenize.py"
BARE = "bare loop of tiktoken, 1 core"
TOGETHER = "bare loops, one per core"
MEGATRON_CHUNK = 32  # lines per task of its workers


@dataclass(frozen=True)
class Task:
    """A task: the .jsonl, the tokenizer's folder, the number of processes, and a folder to write in."""

    text: Path
    tokenizer: Path
    workers: int
    out: Path

    def encoding(self) -> tiktoken.Encoding:
        spec = TokenizerSpec.load(self.tokenizer)
        return tiktoken.Encoding(
            spec.name, pat_str=spec.pattern, mergeable_ranks=spec.ranks, special_tokens=spec.special_tokens
        )

    @property
    def end(self) -> int:
        return TokenizerSpec.load(self.tokenizer).end_of_document


Tokeniser = Callable[[Task], float]  # -> seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(table(options, Path(folder)))


def table(options: argparse.Namespace, folder: Path) -> str:
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
    progress("text and tokenizer")
    text_bytes = write_text(text, int(options.megabytes * 1e6))
    train_bpe(texts_of(text), options.rows, PATTERNS["cl100k"], 1 << 23, text_bytes).save(tokenizer)
    names = [name for name, (_, package) in TOKENISERS.items() if find_spec(package)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    digests = {}
    for turn in range(options.repeats):
        for name in names:  # in turns, so that a busy moment of the machine affects all equally
            progress(f"turn {turn + 1} of {options.repeats}: {name}")
            task = Task(text, tokenizer, options.workers, folder / "out")
            task.out.mkdir()
            seconds[name].append(TOKENISERS[name][0](task))
            if name not in (BARE, TOGETHER):
                digests[name] = tokens_in(task.out)
            shutil.rmtree(task.out)
    assert len(set(digests.values())) <= 1, f"not the same tokens: {digests}"
    rate = {name: text_bytes / 1e6 / statistics.median(values) for name, values in seconds.items()}
    rows = [[name, f"{rate[name]:.1f}", f"{rate[name] / rate[BARE] / options.workers:.2f}"] for name in names]
    title = f"{options.workers} processes, {text_bytes / 1e6:.0f} MB of Python source, {options.rows:,} rows\n\n"
    return title + markdown(["from .jsonl to token files", "MB/s", f"× bare loop × {options.workers}"], rows)


def write_text(path: Path, least: int) -> int:
    """Writes every .py file, repeated if there is not enough text. Returns the bytes of text."""
    files = [file for key in ("stdlib", "purelib") for file in sorted(Path(sysconfig.get_path(key)).rglob("*.py"))]
    size = 0
    with open(path, "w") as stream:
        for file in itertools.cycle(files):
            if size >= least:
                return size
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if text := file.read_text():
                    size += len(text.encode())
                    stream.write(json.dumps({"text": text}) + "\n")
    return size


def texts_of(path: Path) -> Iterator[str]:
    with open(path) as stream:
        for line in stream:
            yield json.loads(line)["text"]


def tokens_in(folder: Path) -> tuple[int, int]:
    """The number of tokens and their sum, which do not depend on the documents' order. Ours has a manifest, Megatron an
    index.
    """
    if (folder / "made" / "manifest.json").exists():
        entries = Manifest.load(folder / "made").files
        parts = [TokenFile(folder / "made" / entry.name).tokens for entry in entries]
    elif list(folder.glob("*.idx")):
        parts = [TokenFile(folder / "made").tokens]
    else:
        parts = [np.memmap(folder / "made.bin", np.uint16, mode="r")]
    return sum(map(len, parts)), sum(int(part.sum(dtype=np.int64)) for part in parts)


# --- the tokenisers ---------------------------------------------------------------------------------------------------


def bare(task: Task) -> float:
    encoding, texts = task.encoding(), list(texts_of(task.text))
    start = time.perf_counter()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return time.perf_counter() - start


def together(task: Task) -> float:
    """Runs all bare loops at once; the seconds from the first start to the last end."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(task.workers)
    with context.Pool(task.workers, _start_together, (task, barrier)) as pool:
        begins, ends = zip(*pool.map(_part, range(task.workers), 1), strict=True)
    return max(ends) - min(begins)


def _start_together(task: Task, barrier: Any) -> None:
    global _task, _barrier
    _task, _barrier = task, barrier


def _part(number: int) -> tuple[float, float]:
    encoding, texts = _task.encoding(), list(texts_of(_task.text))[number :: _task.workers]
    _barrier.wait()
    start = time.perf_counter()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return start, time.perf_counter()


def rowshard(task: Task, *settings: str) -> float:
    command = [sys.executable, str(SCRIPT), "corpus=files", f"corpus.paths=['{task.text}']", "tokenizer=file"]
    command += [f"tokenizer.path={task.tokenizer}", f"out={task.out / 'made'}", f"workers={task.workers}"]
    start = time.perf_counter()
    done = subprocess.run([*command, *settings], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert "gigatoken is not used" not in done.stdout, done.stdout
    return seconds


def rowshard_tiktoken(task: Task) -> float:
    return rowshard(task, "gigatoken=false")


def rowshard_gigatoken(task: Task) -> float:
    return rowshard(task, "gigatoken=true")


def megatron(task: Task) -> float:
    """Works as Megatron's preprocess_data: a pool encodes lines, and one process writes the ids with its builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    start = time.perf_counter()
    builder = IndexedDatasetBuilder(str(task.out / "made.bin"), dtype=np.uint16)
    with open(task.text) as lines, multiprocessing.get_context("fork").Pool(task.workers, _start, (task,)) as pool:
        for ids in pool.imap(_encode_line, lines, MEGATRON_CHUNK):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(task.out / "made.idx"))
    return time.perf_counter() - start


def _start(task: Task) -> None:
    global _encoding, _end
    _encoding, _end = task.encoding(), task.end


def _encode_line(line: str) -> list[int]:
    return [*_encoding.encode_ordinary(json.loads(line)["text"]), _end]


def datasets_map(task: Task) -> float:
    """Works as nanoGPT's prepare.py: `map` in processes, then all ids into one memmap."""
    import datasets

    datasets.disable_progress_bars()
    encoding, end = task.encoding(), task.end

    def encode(row: dict) -> dict:
        ids = [*encoding.encode_ordinary(row["text"]), end]
        return {"ids": ids, "length": len(ids)}

    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(task.text), split="train", cache_dir=str(task.out / "cache"))
    made = rows.map(encode, remove_columns=["text"], num_proc=task.workers)
    ids = np.memmap(task.out / "made.bin", np.uint16, mode="w+", shape=(sum(made["length"]),))
    place = 0
    for batch in made.with_format("numpy").iter(1024):
        part = np.concatenate(batch["ids"])
        ids[place : place + len(part)] = part
        place += len(part)
    ids.flush()
    return time.perf_counter() - start


def fresh(tokeniser: Tokeniser) -> Tokeniser:
    return lambda task: in_fresh_process(tokeniser, task)


TOKENISERS: dict[str, tuple[Tokeniser, str]] = {  # and the package that each needs
    BARE: (fresh(bare), "tiktoken"),
    TOGETHER: (fresh(together), "tiktoken"),
    "Rowshard": (rowshard_tiktoken, "tiktoken"),
    "Rowshard with gigatoken": (rowshard_gigatoken, "gigatoken"),
    "Megatron-Core's builder, its method": (fresh(megatron), "megatron"),
    "datasets.map, nanoGPT's method": (fresh(datasets_map), "datasets"),
}


if __name__ == "__main__":
    main()
